// Package fault makes programs fail at chosen steps. It is compiled to nothing
// without the build tag "fault": then Enabled is false, no step does anything, and
// no environment variable is looked at.
//
// With the tag, a process whose environment has FAULT_DIR looks into that folder at
// every step it passes:
//
//   - plan: one fault a line, "ROLE STEP N ACTION"; carried out one after another,
//     each once, by whichever process of that role comes to the step for the Nth time
//     since the fault before it was carried out. No plan: nothing happens.
//   - fired-I: made by the process that carries out fault I, with its pid in it.
//   - go-I: made by whoever watches, to let a process go on that holds at fault I.
//   - trace: when it is there, each step passed is appended as a line "ROLE STEP",
//     and "ROLE FIRED" for each fault that is carried out.
//
// The roles are keeper, supervisor, successor (a supervisor that another one started)
// and, for a worker, the name of its program up to the first dot: a test gives its
// programs names such as old and new.
package fault
