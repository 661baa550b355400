// Package faults runs a whole ktlsvisor, built with the tag "fault", once for every
// case: an operation, and a process that dies, stops, or meets an error at one step of
// it. Clients that check every byte, the unit's own account and the state it leaves are
// compared with what the design allows; docs/faults.md is the table of all cases.
package faults
