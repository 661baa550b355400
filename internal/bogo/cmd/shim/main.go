// Command shim is what BoringSSL's test runner starts once per test.
package main

import (
	"os"

	"github.com/ktlsvisor/ktlsvisor/internal/bogo"
)

func main() { os.Exit(bogo.Shim(os.Args[1:], os.Stdout, os.Stderr)) }
