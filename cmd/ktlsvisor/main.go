// Command ktlsvisor keeps TLS connections open across upgrades and crashes of the
// programs that serve them. docs/cli.md is the contract of this command line.
package main

import (
	"context"
	"io"
	"os"
)

func main() { os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr)) }

// Main runs one command line and returns its exit code.
func Main(args []string, stdout, stderr io.Writer) int {
	a := &app{out: stdout, err: stderr}
	root := a.rootCommand()
	root.SetArgs(args)
	return a.exitCode(root.ExecuteContext(context.Background()))
}
