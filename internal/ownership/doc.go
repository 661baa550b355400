// Package ownership is the ledger as a state machine: it decides who owns a session. It is a state machine without any I/O:
// every message about a session, every death and every decision is an event, a method
// of Machine; what has to be done about it comes out as effects, in the order in which
// they have to be carried out. It reads no clock, starts nothing and waits for nothing,
// so that random schedules of events can be run through it by the million.
//
// One session:
//
//	                 Offer                      Adopted: commit
//	Admit --> held ---------> offered ----------------------------------> owned
//	           ^ ^               |                                       |  ^  |
//	           | +--- Undo ------+                                Freeze |  |  | Dead
//	           |                                                         v  |  v
//	           |                  +------------ Undo: THAW --------- freezing  doubt
//	           |                  |                                  |    |     |
//	           |                  +--> owned        Parked           |    |     +-- SettledHeld --> held
//	           |                  |                                  v    |     +-- SettledGone, SettledLost --> ended
//	           |                  +------------ Undo: THAW -------- parked|
//	           |                  |                                  |    | Dead: doubt; Cut: owned
//	           |                  |                           Offer  |
//	           |                  |                                  v
//	           |                  +------------ Undo: THAW -------- given ---- Adopted: commit ---> owned, by
//	           |                                                     |                             another
//	           +----------------------- Undo, owner dead or cut -----+
//
//	owned, freezing, parked, given: --- Closed ---> ended
//	held, offered: --- Lose ---> ended
//
// In doubt is a session whose owner has been seen dead while it served: how far it came
// is being found out. Whoever is dead or cut (its channel is closed, though it may live)
// gets no message any more; what it had parked goes on from the parked state. Nobody may
// be left who owns a session and does not know: a worker whose channel ends before it has
// certainly heard all RESUMEs and THAWs is killed.
//
// Every attempt to give a session another owner has an epoch of its own, higher than
// all before. An answer with another epoch is late and changes nothing. The commit is
// the effect Put with a new owner: before it the old owner owns, after it the new one,
// whoever dies. Put comes before Void, Void before Resume, Resume before Release.
//
// A group is a set of sessions that go through this together: Parked for all before
// Offer for any, Adopted from all before the commit of the first, all commits before
// the first Resume. A group whose owner died is offered together as well.
package ownership
