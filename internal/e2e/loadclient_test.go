package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/load"
)

// generous bounds what should take a fraction of it, on machines that are busy
// with something else.
const generous = 5 * time.Second

// loadProcess is a fleet in a process of its own.
type loadProcess struct {
	t    *testing.T
	in   io.WriteCloser
	out  *bufio.Reader
	errs strings.Builder
	cmd  *exec.Cmd
	done bool
}

// startLoad connects n clients and returns when all are.
func startLoad(t *testing.T, u *unit, n int) *loadProcess {
	t.Helper()
	l := &loadProcess{t: t, cmd: exec.Command(build(t, "internal/load/cmd/loadclient", "loadclient", false),
		"-addr", u.Addr, "-insecure", "-sessions", fmt.Sprint(n), "-stdin", "-quiet", "-stop-wait", "30s")}
	var err error
	if l.in, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.out = bufio.NewReader(out)
	l.cmd.Stderr = &l.errs
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !l.done {
			_ = l.cmd.Process.Kill()
			_ = l.cmd.Wait()
		}
	})
	l.report() // the first answer comes when all are connected
	return l
}

func (l *loadProcess) say(line string) {
	l.t.Helper()
	if _, err := fmt.Fprintln(l.in, line); err != nil {
		l.t.Fatalf("the clients' process: %v\n%s", err, l.errs.String())
	}
}

// phase begins a phase; names have no spaces there.
func (l *loadProcess) phase(name string) {
	l.t.Helper()
	l.advance()
	l.say("phase " + strings.ReplaceAll(name, " ", "_"))
}

func (l *loadProcess) report() (r load.Report) {
	l.t.Helper()
	l.say("report")
	l.read(&r)
	return r
}

func (l *loadProcess) read(r *load.Report) {
	l.t.Helper()
	line, err := l.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, r)
	}
	if err != nil {
		_ = l.cmd.Process.Kill()
		_ = l.cmd.Wait()
		l.done = true
		l.t.Fatalf("the clients' process: %v\n%s", err, l.errs.String())
	}
}

// advance waits until every client has had some echoes more, on average.
func (l *loadProcess) advance() {
	l.t.Helper()
	was := l.report()
	want := was.FramesChecked + 5*int64(was.Alive)
	eventually(l.t, "the clients to get more echoes", func() bool {
		r := l.report()
		return r.FramesChecked >= want || r.Alive == 0
	})
}

// stop ends the clients with their last words.
func (l *loadProcess) stop() (r load.Report) {
	l.t.Helper()
	l.advance()
	l.say("stop")
	l.read(&r)
	l.done = true
	_ = l.cmd.Wait() // its exit code says what r.Err does
	return r
}
