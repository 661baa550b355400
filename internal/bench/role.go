package bench

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// envRole makes this program play one of the parts below and nothing else: what is
// measured must not share a process with what drives it.
const envRole = "KTLSVISOR_BENCH_ROLE"

// roles take their arguments from args; they read orders from standard input and
// answer each with one line.
var roles = map[string]func(args []string, in *bufio.Scanner, out io.Writer) error{
	"stock-idle":      stockIdle,
	"clients":         holdClients,
	"handshakes":      serveHandshakes,
	"fetch":           fetch,
	"case":            runCase,
	"move-unit":       moveUnit,
	"thin-clients":    thinClients,
	"self-server":     selfServer,
	"talking-clients": talkingClients,
	"raw-sink":        rawSink,
}

// Main plays a role if this process was started for one; it returns otherwise. It
// must be the first that a program with this package does.
func Main() {
	name := os.Getenv(envRole)
	if name == "" {
		return
	}
	f := roles[name]
	if f == nil {
		fmt.Fprintf(os.Stderr, "bench: unknown role %q\n", name)
		os.Exit(2)
	}
	if err := f(os.Args[1:], bufio.NewScanner(os.Stdin), os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %s: %v\n", name, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child is this program in one of the roles.
type child struct {
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Scanner
}

func startRole(name string, args ...string) (*child, error) { return startRoleWith(name, nil, args...) }

// startRoleWith also gives the child a file, as descriptor 3; it stays the caller's.
func startRoleWith(name string, f *os.File, args ...string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), envRole+"="+name)
	if name == "case" {
		// crypto/tls then prefers ChaCha20-Poly1305, which does not use these instructions.
		cmd.Env = append(cmd.Env, "GODEBUG=cpu.aes=off")
	}
	cmd.Stderr = os.Stderr
	if f != nil {
		cmd.ExtraFiles = []*os.File{f}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &child{name, cmd, in, bufio.NewScanner(out)}, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// order sends a line and returns the answer.
func (c *child) order(format string, args ...any) (string, error) {
	if _, err := fmt.Fprintf(c.in, format+"\n", args...); err != nil {
		return "", fmt.Errorf("%s: %w", c.name, err)
	}
	return c.answer()
}

func (c *child) answer() (string, error) {
	if !c.out.Scan() {
		return "", fmt.Errorf("%s ended without an answer: %w", c.name, errors.Join(c.out.Err(), c.cmd.Wait()))
	}
	line := c.out.Text()
	if why, ok := strings.CutPrefix(line, "error "); ok {
		return "", fmt.Errorf("%s: %s", c.name, why)
	}
	return line, nil
}

// stop ends the child: roles end with their input.
func (c *child) stop() error {
	_ = c.in.Close()
	limit := time.AfterFunc(30*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer limit.Stop()
	if err := c.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	return nil
}
