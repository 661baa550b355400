package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

func init() { roles["stubborn"] = stubborn }

// hold is what makes a stubborn handler stop reading until it is told to go on.
const hold = "please hold\n"

// stubborn is an echo worker whose handler, when asked to hold, reaches no safe
// point before a file appears in the directory that its argument names.
func stubborn() int {
	dir := os.Args[1]
	err := handoff.Serve(context.Background(), handoff.HandlerFunc(func(ctx context.Context, c *handoff.Conn) error {
		buf := make([]byte, 4096)
		for {
			n, err := c.Read(buf)
			if bytes.Equal(buf[:n], []byte(hold)) {
				if err := os.WriteFile(filepath.Join(dir, "holding"), nil, 0o600); err != nil {
					return err
				}
				awaitFile(filepath.Join(dir, "go"))
			}
			if _, werr := c.Write(buf[:n]); werr != nil {
				return werr
			}
			if err != nil {
				return err
			}
		}
	}))
	return exitOf(err)
}

func exitOf(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func awaitFile(path string) {
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		<-t.C
	}
}

// held is a session of a handler that is stubborn at the moment.
type held struct {
	t    *testing.T
	conn *tls.Conn
	dir  string
}

// startStubborn starts a unit whose program can hold sessions back, as stubborn has it do
// with dir. conf are further keys of the pool.
func startStubborn(t *testing.T, conf string) (u *unit, dir string) {
	t.Helper()
	dir = tempDir(t)
	return start(t, visor.Options{Args: []string{"-c", configFile(t, []string{role(t, "stubborn"), dir}, "", conf)}}), dir
}

// stubborn connects a client and makes its handler hold.
func (u *unit) stubborn(dir string) *held {
	u.t.Helper()
	c, err := tls.Dial("tcp", u.Addr, insecure())
	if err != nil {
		u.t.Fatal(err)
	}
	u.t.Cleanup(func() { c.Close() })
	h := &held{u.t, c, dir}
	if _, err := io.WriteString(c, hold); err != nil {
		u.t.Fatal(err)
	}
	eventually(u.t, "the handler to hold", func() bool {
		_, err := os.Stat(filepath.Join(dir, "holding"))
		return err == nil
	})
	return h
}

// yield lets the handler go on: what it had read comes back now.
func (h *held) yield() {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.dir, "go"), nil, 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.hear(hold)
}

func (h *held) hear(want string) {
	h.t.Helper()
	buf := make([]byte, len(want))
	_ = h.conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(h.conn, buf); err != nil || string(buf) != want {
		h.t.Fatalf("heard %q (%v), want %q", buf, err, want)
	}
}

func (h *held) talk() {
	h.t.Helper()
	if _, err := io.WriteString(h.conn, "still there?\n"); err != nil {
		h.t.Fatal(err)
	}
	h.hear("still there?\n")
}

// A handler that reaches no safe point is not moved by force: the upgrade says so
// with exit code 4, the session stays where it is, and goes when it can.
func TestSessionAtNoSafePointStaysAndMovesLater(t *testing.T) {
	u, dir := startStubborn(t, `freeze_timeout = "200ms"`)
	f := u.fleet(bystanders)
	s := u.stubborn(dir)
	rep := u.upgradeReport(4, "--wait", "1s")
	p := rep.Pools[0]
	if p.Stayed != 1 || p.Moved != bystanders || p.Lost+p.Returned+p.Interrupted != 0 {
		t.Errorf("report %+v, want 1 stayed and %d moved", p, bystanders)
	}
	if len(p.Reasons) == 0 {
		t.Error("the report does not say why it stayed")
	}
	s.yield()
	s.talk()
	// A later upgrade takes it along, if it has not gone by itself by then.
	u.run(0, "upgrade")
	u.settled(bystanders + 1)
	s.talk()
	f.intact()
}
