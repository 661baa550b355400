package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/spec"
)

// guestNofile is the descriptor limit in a guest: room for a few thousand
// sessions, each with its client in the same guest.
const guestNofile = 65536

// run is the second process: it runs every test binary and returns the code for
// the guest's exit line.
func run() int {
	port, err := openPort()
	if err != nil {
		fmt.Fprintln(os.Stderr, "init: results:", err)
		return 93
	}
	r := &runner{port: port}
	r.line("kernel %s", sys.KernelRelease())
	data, err := os.ReadFile(spec.Path)
	if err != nil {
		r.line("note %v", err)
		return 94
	}
	var s spec.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		r.line("note %s: %v", spec.Path, err)
		return 94
	}
	loadModules(s.Modules, func(text string) { r.line("note %s", text) })
	if err := sys.InterfaceUp("lo"); err != nil {
		r.line("note %v", err)
		return 95
	}
	if err := sys.SetRlimitNofile(0, guestNofile); err != nil {
		r.line("note %v", err)
		return 95
	}
	worst := 0
	for _, t := range s.Tests {
		if code := r.test(t, s.Env); code != 0 {
			worst = 1
		}
	}
	if r.err != nil {
		fmt.Fprintln(os.Stderr, "init: results:", r.err)
		return 96
	}
	return worst
}

// runner writes result lines; err is the first failure to do so.
type runner struct {
	port io.Writer
	err  error
}

func (r *runner) line(format string, args ...any) {
	if _, err := fmt.Fprintf(r.port, format+"\n", args...); err != nil && r.err == nil {
		r.err = err
	}
}

// test runs one binary and returns its exit code.
func (r *runner) test(t spec.Test, env []string) int {
	r.line("begin %s", t.Package)
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(t.Seconds)*time.Second)
	defer cancel()
	out := &lineWriter{r: r}
	cmd := exec.CommandContext(ctx, t.Binary, t.Args...)
	cmd.Dir = t.Dir
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// A process that outlives its test holds the pipe open; it is killed below.
	cmd.WaitDelay = 2 * time.Second
	err := cmd.Run()
	out.flush()
	code := 0
	switch exit := (*exec.ExitError)(nil); {
	case ctx.Err() != nil:
		r.line("|killed after its time limit of %d s", t.Seconds)
		code = 124
	case errors.As(err, &exit):
		code = exit.ExitCode()
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			code = 128 + int(ws.Signal())
		}
	case errors.Is(err, exec.ErrWaitDelay):
		r.line("note %s left processes behind that held its output open", t.Package)
	case err != nil:
		r.line("|%v", err)
		code = 126
	}
	// The next package starts on a machine without this one's processes.
	if err := sys.KillEveryone(); err != nil {
		r.line("note kill what %s left behind: %v", t.Package, err)
	}
	r.line("end %s %d %.2f", t.Package, code, time.Since(start).Seconds())
	return code
}

// lineWriter passes whole lines on, each marked as output of a test binary, so
// that nothing a test prints can be taken for a line of ours.
type lineWriter struct {
	r   *runner
	buf bytes.Buffer
}

// maxLine bounds the memory that a test which never ends its line takes, in bytes.
const maxLine = 64 << 10

func (w *lineWriter) Write(p []byte) (int, error) {
	w.buf.Write(p)
	for {
		i := bytes.IndexByte(w.buf.Bytes(), '\n')
		if i < 0 {
			if w.buf.Len() > maxLine {
				w.flush()
			}
			return len(p), nil
		}
		w.r.line("|%s", w.buf.Next(i + 1)[:i])
	}
}

func (w *lineWriter) flush() {
	if w.buf.Len() > 0 {
		w.r.line("|%s", w.buf.Bytes())
		w.buf.Reset()
	}
}
