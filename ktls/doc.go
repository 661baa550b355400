// Package ktls makes TLS sessions that outlive the process that made them: the
// handshake is stock crypto/tls, and the established session then moves to a
// record layer that can be handed to another process together with its socket.
//
//	conn, err := ktls.Server(ctx, tcpConn, &ktls.Config{TLS: tlsConfig})
//	...
//	_ = conn.SetDeadline(time.Unix(1, 0))       // make Read and Write return
//	sock, state, err := conn.Detach()           // here
//	facts, err := state.MarshalFacts()
//	record, err := state.MarshalRecord()
//	...                                         // sock travels by SCM_RIGHTS
//	conn, err = ktls.Import(sock, facts, record) // there
//
// Two record layers do the same things. The kernel's (kTLS) keeps all state in the
// socket, and the process that owns it needs no secrets. The software layer works
// everywhere; keys and sequence numbers then travel in the record. Config.Mode
// chooses; ModeAuto prefers the kernel where it can carry the session both ways.
//
// What is carried: TLS 1.3 and 1.2 with AEAD suites (AES-128-GCM, AES-256-GCM,
// ChaCha20-Poly1305; in TLS 1.2 with ECDHE), both roles. What is not: 0-RTT,
// renegotiation, post-handshake client authentication, resumption of TLS 1.2, and
// ExportKeyingMaterial after the handshake.
//
// Where this package deviates from crypto/tls, on purpose: FIN without
// close_notify is ErrTruncated and not io.EOF; a KeyUpdate with an invalid request
// is answered with illegal_parameter (RFC 8446 section 4.6.3); ChangeCipherSpec
// after the handshake with unexpected_message (section 5); renegotiation of TLS
// 1.2 is refused with a warning and the session lives on; several KeyUpdates that
// ask for an answer may get one.
package ktls
