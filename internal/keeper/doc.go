// Package keeper is the small parent process that holds descriptors and memory
// files, so that the supervisor may die. It knows nothing of TLS, configuration
// or workers: it stores entries under keys, restarts the supervisor, reaps
// orphans, and reads the workers' output while no supervisor does.
//
//	supervisor A            keeper              supervisor B
//	    | -- HELLO(pidfd) ---> |                      |
//	    | -- LEAD -----------> |  incarnation 1       |
//	    | -- PUT, DELETE, … -> |                      |
//	    | -- SUCCESSOR ------> |                      |
//	    | <- a channel ------- |                      |
//	    |  passes it to B, which A starts itself      |
//	    | -- YIELD ----------> | <--- HELLO(pidfd) -- |
//	    |                      | <--- LEAD ---------- |  incarnation 2
//	    |   if B failed:       |                      |
//	    | -- RECLAIM --------> |  incarnation 1 again |
//
// A supervisor that dies is the same path without A: the keeper makes the
// channel and starts B. At most one process leads; only the leader's changes are
// taken. A leader stops being it by YIELD or by its death (its pidfd readable),
// never by the loss of its channel alone.
//
// [Run] is the keeper's side, [Client] the supervisor's. The keeper never reads
// or maps what it holds, except pipes of [KindOutput].
package keeper
