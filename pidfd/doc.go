// Package pidfd holds on to processes without the races of process ids.
//
// A process id names another process as soon as its first owner was waited for. A
// pidfd (pidfd_open(2), Linux 5.3) names one process for ever: a signal sent through
// it reaches that process or nobody, and it becomes readable when the last thread
// of the process has exited, for any process, not only for children. That is the
// only thing that proves that a process no longer touches a socket.
package pidfd
