package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// bystanders is the number of clients that must not notice what others do.
const bystanders = 20

// What a client may do wrong costs it its own connection, one line of the log, and
// nobody else anything.
func TestClientsThatMisbehaveHarmOnlyThemselves(t *testing.T) {
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, `handshake_timeout = "500ms"`, "")}})
	f := u.fleet(bystanders)
	for _, c := range []struct {
		name    string
		attack  func(t *testing.T, c net.Conn)
		says    string
		counter func(*admin.Status) uint64
	}{
		{"speaks HTTP", func(t *testing.T, c net.Conn) {
			_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			awaitEnd(t, c)
		}, "does not speak TLS", func(st *admin.Status) uint64 { return st.Handshakes.Failed }},
		{"says nothing", func(t *testing.T, c net.Conn) { awaitEnd(t, c) },
			"not finished in time", func(st *admin.Status) uint64 { return st.Handshakes.TimedOut }},
		{"stalls in the ClientHello", func(t *testing.T, c net.Conn) {
			_, _ = c.Write([]byte{22, 3, 1, 1, 0, 1, 0, 0})
			awaitEnd(t, c)
		}, "not finished in time", func(st *admin.Status) uint64 { return st.Handshakes.TimedOut }},
		{"has no version in common", func(t *testing.T, c net.Conn) {
			err := tls.Client(c, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}).Handshake()
			if err == nil {
				t.Error("TLS 1.1 was accepted")
			}
		}, "handshake failed", func(st *admin.Status) uint64 { return st.Handshakes.Failed }},
		{"goes away in the handshake", func(t *testing.T, c net.Conn) {
			_, _ = c.Write([]byte{22, 3, 1, 1, 0, 1, 0, 0})
			_ = c.(*net.TCPConn).CloseWrite()
			awaitEnd(t, c)
		}, "handshake failed", func(st *admin.Status) uint64 { return st.Handshakes.Failed }},
		{"sends a record that is no record", garbage([]byte("this is no record, and never was")),
			"TLS protocol error", func(st *admin.Status) uint64 { return st.Reasons["TLS protocol error"] }},
		{"sends a record that cannot be opened", garbage(append([]byte{23, 3, 3, 0, 40}, make([]byte, 40)...)),
			"TLS protocol error", func(st *admin.Status) uint64 { return st.Reasons["TLS protocol error"] }},
		{"sends a record that is too long", garbage([]byte{23, 3, 3, 0xff, 0xff, 1, 2, 3}),
			"TLS protocol error", func(st *admin.Status) uint64 { return st.Reasons["TLS protocol error"] }},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, seen := c.counter(u.status()), u.linesWith(c.says)
			conn, err := net.Dial("tcp", u.Addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			c.attack(t, conn)
			eventually(t, "the counter and one line of the log", func() bool {
				return c.counter(u.status()) == before+1 && u.linesWith(c.says) > seen
			})
			if n := u.linesWith(c.says) - seen; n != 1 {
				t.Errorf("%d lines of the log say %q, want 1", n, c.says)
			}
			for line := range strings.Lines(u.Log()) {
				if strings.Contains(line, c.says) && !strings.Contains(line, "127.0.0.1") && !strings.Contains(line, "session=s") {
					t.Errorf("this line does not say whose connection it was: %s", line)
				}
			}
		})
	}
	f.intact()
}

// awaitEnd reads until the other side has closed.
func awaitEnd(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection was not closed: %v", err)
	}
}

// garbage is a client that shakes hands properly and then sends b beside its
// session. It must be told with an alert.
func garbage(b []byte) func(*testing.T, net.Conn) {
	return func(t *testing.T, c net.Conn) {
		s := tls.Client(c, insecure())
		if _, err := s.Write([]byte("hello")); err != nil {
			t.Error(err)
			return
		}
		buf := make([]byte, 5)
		if _, err := io.ReadFull(s, buf); err != nil || string(buf) != "hello" {
			t.Errorf("%q, %v", buf, err)
			return
		}
		if _, err := c.Write(b); err != nil {
			t.Error(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(patience))
		_, err := s.Read(buf)
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "remote error" {
			t.Errorf("the client was told %v, want an alert", err)
		}
	}
}

// A process of another user cannot drive the unit, hears why, and is written down.
func TestAnotherUserCannotDriveTheUnit(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
	u := start(t, visor.Options{})
	f := u.fleet(bystanders)
	// So that the file system is not what stops it: the socket's mode does already.
	for _, path := range []string{workDir, strings.TrimSuffix(u.Admin.Path(), "/a.sock")} {
		if err := os.Chmod(path, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	asNobody := func() visor.Result {
		cmd := exec.Command(ktlsvisor(t), "--admin", u.Admin.Path(), "stop")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, _ := cmd.CombinedOutput()
		return visor.Result{Code: cmd.ProcessState.ExitCode(), Stderr: string(out)}
	}
	if r := asNobody(); r.Code != 1 || !strings.Contains(r.Stderr, "another user") {
		t.Errorf("with the socket's own mode: %s", r)
	}
	if err := os.Chmod(u.Admin.Path(), 0o666); err != nil {
		t.Fatal(err)
	}
	if r := asNobody(); r.Code != 1 || !strings.Contains(r.Stderr, "65534") {
		t.Errorf("with a socket that lets everybody in: %s", r)
	}
	u.awaitLog("another user's process")
	u.run(0, "upgrade")
	u.settled(bystanders)
	f.intact()
}

// Only one upgrade at a time; the second says which one runs, and changes nothing.
func TestSecondUpgradeIsRefusedWhileOneRuns(t *testing.T) {
	u, dir := startStubborn(t, `freeze_timeout = "300ms"`)
	f := u.fleet(bystanders)
	s := u.stubborn(dir)
	first := make(chan visor.Result, 1)
	go func() { first <- u.Run("upgrade", "--wait", "20s") }()
	u.await("the upgrade to run", func(st *admin.Status) bool { return st.Pools[0].Upgrading })
	for _, args := range [][]string{{"upgrade"}, {"upgrade", "--supervisor"}, {"upgrade", "default", "--json"}} {
		if r := u.Run(args...); r.Code != 1 || !strings.Contains(r.Stderr+r.Stdout, "is running since") {
			t.Errorf("%v while an upgrade runs: want exit code 1 and a word about it: %s", args, r)
		}
	}
	s.yield()
	if r := <-first; r.Code != 0 {
		t.Errorf("the first upgrade: %s", r)
	}
	u.settled(bystanders + 1)
	s.talk()
	f.intact()
}

// A supervisor that is out of descriptors lets new connections wait; those that it
// has do not notice, and once there are descriptors again the new ones are served.
func TestSupervisorOutOfDescriptorsCostsNothing(t *testing.T) {
	u := start(t, visor.Options{})
	f := u.fleet(bystanders)
	st := u.settled(bystanders)
	pid := st.Supervisor.PID
	n, err := visor.Descriptors(pid)
	if err != nil {
		t.Fatal(err)
	}
	// Idle, it has what it needs and no more than a few to spare.
	if err := sys.SetRlimitNofile(pid, uint64(n)+6); err != nil {
		t.Fatal(err)
	}
	const more = 40
	late := make(chan error, more)
	for range more {
		go func() { late <- u.echoOnce("late") }()
	}
	u.awaitLog("raise the NOFILE limit")
	for range more {
		if err := <-late; err != nil {
			t.Errorf("a connection that had to wait: %v", err)
		}
	}
	f.advance()
	// It may be too tight for new workers, which then is said and harms nobody.
	if r := u.Run("upgrade"); r.Code != 0 && (r.Code != 1 || !strings.Contains(r.Stdout+r.Stderr, "too many open files")) {
		t.Errorf("an upgrade without descriptors: %s", r)
	}
	// The next one has the keeper's limit again.
	u.killSupervisor()
	u.run(0, "upgrade")
	u.settled(bystanders)
	f.intact()
}

// linesWith counts the lines of the log that say text.
func (u *unit) linesWith(text string) (n int) {
	for line := range strings.Lines(u.Log()) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// echoOnce is one client that says one word and goodbye.
func (u *unit) echoOnce(word string) error {
	d := net.Dialer{Timeout: patience}
	c, err := tls.DialWithDialer(&d, "tcp", u.Addr, insecure())
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, word); err != nil {
		return err
	}
	buf := make([]byte, len(word))
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != word {
		return fmt.Errorf("said %q, heard %q: %w", word, buf, err)
	}
	return nil
}
