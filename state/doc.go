// Package state keeps application state readable across versions of a program.
//
// A session that moves from one process to another takes its application state
// along: a nick, a room, a half-typed line. The two processes may be different
// builds, so state travels in an [Envelope] that names its schema and version and
// carries a checksum. A [Schema] encodes and decodes one Go type, and knows how to
// bring every older version up to the one it writes:
//
//	var session = state.NewSchema[Session]("chat/session", 2)
//
//	func init() {
//		session.Migrate(1, func(payload []byte) ([]byte, error) { … }) // 1 -> 2
//	}
//
// Before an upgrade touches a session, both generations announce the [Info] of
// each of their schemas, and [Compatible] says whether the new one can restore
// what the old one writes.
//
// The package holds no descriptors and makes no system calls. Input from another
// process is not trusted: it is bounded, checked and never causes a panic.
package state
