// Package visor runs a real ktlsvisor for tests and drills: its programs as they
// are shipped, its own admin socket, port 0, and no process left behind.
package visor
