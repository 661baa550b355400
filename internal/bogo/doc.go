// Package bogo lets BoringSSL's TLS test runner (ssl/test/runner, "BoGo") test the
// record layers of package ktls.
//
// The runner plays the peer and breaks the protocol in some hundred ways; the shim
// plays us: one process per test, whose flags say what to do and which answer is
// right. Here the handshake is crypto/tls's through ktls.Server and ktls.Client,
// and everything after it is a ktls.Conn's.
//
// The runner is not part of this repository: docs/conformance.md says how to run
// it and what the results are. What holds without it is in the tests.
package bogo
