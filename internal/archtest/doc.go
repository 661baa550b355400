// Package archtest holds the test that enforces docs/ARCHITECTURE.md: who may
// import whom, and why.
package archtest
