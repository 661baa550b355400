// Package e2e tests the programs as they are shipped, with real clients: on the
// host in the software layer, and in the guests of `make vmtest` in the kernel's.
package e2e
