package e2e

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// finConn knows whether the end of the TCP stream has been seen: crypto/tls reports
// io.EOF both for close_notify and for a FIN without one.
type finConn struct {
	net.Conn
	fin atomic.Bool
}

func (c *finConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.fin.Store(true)
	}
	return n, err
}

// A unit that is told to end says goodbye to every client, with close_notify, and
// leaves no process and no socket behind; whether by a signal or by `stop`.
func TestUnitThatStopsSaysGoodbye(t *testing.T) {
	for name, stop := range map[string]func(u *unit){
		"SIGTERM": func(u *unit) {
			if err := u.Signal(u.KeeperPID(), syscall.SIGTERM); err != nil {
				u.t.Fatal(err)
			}
		},
		"SIGINT": func(u *unit) {
			if err := u.Signal(u.KeeperPID(), syscall.SIGINT); err != nil {
				u.t.Fatal(err)
			}
		},
		"stop":                            func(u *unit) { u.run(0, "stop") },
		"stop after a supervisor's death": func(u *unit) { u.killSupervisor(); u.run(0, "stop") },
	} {
		t.Run(name, func(t *testing.T) {
			u := start(t, visor.Options{})
			const n = 10
			ends := make(chan error, n)
			for range n {
				raw, err := net.Dial("tcp", u.Addr)
				if err != nil {
					t.Fatal(err)
				}
				fc := &finConn{Conn: raw}
				c := tls.Client(fc, insecure())
				t.Cleanup(func() { c.Close() })
				if _, err := c.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				var b [1]byte
				if _, err := io.ReadFull(c, b[:]); err != nil {
					t.Fatal(err)
				}
				go func() {
					_ = c.SetReadDeadline(time.Now().Add(patience))
					_, err := c.Read(b[:])
					if err == io.EOF && fc.fin.Load() {
						err = errors.New("FIN without close_notify")
					}
					ends <- err
				}()
			}
			u.settled(n)
			stop(u)
			for range n {
				if err := <-ends; err != io.EOF {
					t.Errorf("a client's connection ended with %v, want close_notify", err)
				}
			}
			if code := u.ExitCode(patience); code != 0 {
				t.Errorf("exit code %d, want 0", code)
			}
			if left := u.Processes(); len(left) > 0 {
				t.Errorf("processes %v are left", left)
			}
			if _, err := os.Lstat(u.Admin.Path()); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the admin socket is left (%v)", err)
			}
			r := u.Run("status")
			if r.Code != 1 {
				t.Errorf("status of a unit that has ended: %s", r)
			}
		})
	}
}

// When the keeper is killed there is nothing left to hold the sessions together;
// but nothing may hang about either, and the same command line serves again.
func TestKilledKeeperLeavesNothingBehind(t *testing.T) {
	dir := tempDir(t)
	u := start(t, visor.Options{Dir: dir})
	if err := u.echoOnce("hello"); err != nil {
		t.Fatal(err)
	}
	if err := u.KillProcess(u.KeeperPID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "supervisor and workers to end without their keeper", func() bool { return len(u.Processes()) == 0 })
	// The socket's file is stale now, which must not keep the next one from starting.
	again := start(t, visor.Options{Dir: dir})
	if err := again.echoOnce("hello again"); err != nil {
		t.Error(err)
	}
	again.await("no session", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
}
