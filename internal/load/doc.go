// Package load is a fleet of stock crypto/tls clients that check every byte an
// echo service sends back. It is how the demo, the end-to-end tests and the
// benchmark know that no session was lost and no byte lost, doubled or changed.
//
// A client keeps one connection from Start to Stop and never reconnects: a
// connection that ends before Stop is a lost session. It sends a frame of
// random size and content every Interval and compares what comes back with
// what it sent, byte by byte and in order.
//
// The one deviation that is ever forgiven is a gap in a phase that was begun
// with mayInterrupt, for a service whose owner is killed: what the owner had
// read and not yet answered is gone. The gap is counted, and what is left of
// the stream must still be pieces of what was sent, in order. Bytes that were
// doubled, changed or made up are wrong in every phase.
package load
