package e2e

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// Clients that write and write and do not read, so that everything on the way is
// full and their workers stand blocked in a write, move like all others: no byte
// of what was half sent, half received or waiting in between is lost or doubled.
func TestHostBlockedSessionsMoveWithEveryByte(t *testing.T) {
	blockedSessionsMove(t, 24<<20, 6)
}

func TestKernelLayerBlockedSessionsMoveWithEveryByte(t *testing.T) {
	guest.NeedKernelTLS(t)
	blockedSessionsMove(t, 16<<20, 2) // a guest's crypto is slow
}

func blockedSessionsMove(t *testing.T, limit, clients int) {
	u := start(t, visor.Options{})
	all := make([]*glutton, clients)
	for i := range all {
		version := uint16(tls.VersionTLS13)
		if i%2 == 1 {
			version = tls.VersionTLS12
		}
		all[i] = u.glutton(version, limit)
	}
	// Each writes far more than all buffers on the way hold.
	for _, g := range all {
		g.fill()
	}
	for _, g := range all {
		g.standsStill()
	}
	before := visor.WorkerPIDs(u.settled(clients))
	u.run(0, "upgrade")
	allNew(t, before, visor.WorkerPIDs(u.settled(clients)))
	u.run(0, "upgrade", "--supervisor")
	u.killSupervisor()
	// Half of what comes back, another move, and the rest.
	for _, g := range all {
		g.drain(g.sent / 2)
	}
	u.run(0, "upgrade")
	for _, g := range all {
		g.drain(g.sent - g.got)
		if err := g.conn.Close(); err != nil {
			t.Error(err)
		}
	}
	st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.Lost+c.Interrupted != 0 {
		t.Errorf("counters %+v", c)
	}
}

// A glutton is a client that writes without reading. What it writes is a stream that
// its seed determines, so that it can be compared byte for byte.
type glutton struct {
	t         *testing.T
	conn      *tls.Conn
	patient   *patientConn
	in, out   *rand.ChaCha8 // the stream as it is written, and as it should come back
	limit     int
	sent, got int
}

func (u *unit) glutton(version uint16, limit int) *glutton {
	u.t.Helper()
	raw, err := net.Dial("tcp", u.Addr)
	if err != nil {
		u.t.Fatal(err)
	}
	u.t.Cleanup(func() { raw.Close() })
	tcp := raw.(*net.TCPConn)
	if err := errors.Join(tcp.SetReadBuffer(64<<10), tcp.SetWriteBuffer(64<<10)); err != nil {
		u.t.Fatal(err)
	}
	c := insecure()
	c.MinVersion, c.MaxVersion = version, version
	seed := [32]byte{byte(version), byte(limit >> 16), 7}
	g := &glutton{t: u.t, limit: limit, in: rand.NewChaCha8(seed), out: rand.NewChaCha8(seed)}
	g.patient = newPatientConn(raw)
	g.conn = tls.Client(g.patient, c)
	if err := g.conn.Handshake(); err != nil {
		u.t.Fatal(err)
	}
	return g
}

// patientConn takes what crypto/tls writes and sends it from a goroutine of its own,
// so that a client can write more than the way holds and then read.
type patientConn struct {
	net.Conn
	queue chan []byte // room for all that a test writes
}

func newPatientConn(c net.Conn) *patientConn {
	p := &patientConn{Conn: c, queue: make(chan []byte, 4096)}
	go func() {
		for b := range p.queue {
			if _, err := c.Write(b); err != nil {
				return // the test has ended
			}
		}
	}()
	return p
}

func (c *patientConn) Write(b []byte) (int, error) {
	c.queue <- bytes.Clone(b)
	return len(b), nil
}

// fill writes up to the limit: far more than all buffers on the way can hold.
func (g *glutton) fill() {
	g.t.Helper()
	buf := make([]byte, 16<<10)
	for g.sent < g.limit {
		_, _ = g.in.Read(buf)
		n, err := g.conn.Write(buf)
		g.sent += n
		if err != nil {
			g.t.Fatalf("after %d bytes: %v", g.sent, err)
		}
	}
}

// standsStill waits until nothing has been taken from the client for a while,
// although it has more to send.
func (g *glutton) standsStill() {
	g.t.Helper()
	left, since := len(g.patient.queue), time.Now()
	eventually(g.t, "everything to be full", func() bool {
		if n := len(g.patient.queue); n != left {
			left, since = n, time.Now()
		}
		return time.Since(since) > standstill
	})
	if left == 0 {
		g.t.Fatalf("all of %d bytes were taken: nobody is blocked", g.sent)
	}
}

// standstill is longer than any pause of something that moves.
const standstill = 500 * time.Millisecond

// drain reads n bytes and compares them.
func (g *glutton) drain(n int) {
	g.t.Helper()
	buf, want := make([]byte, 32<<10), make([]byte, 32<<10)
	_ = g.conn.SetReadDeadline(time.Now().Add(2 * patience))
	for n > 0 {
		k := min(n, len(buf))
		if _, err := io.ReadFull(g.conn, buf[:k]); err != nil {
			g.t.Fatalf("after %d of %d bytes: %v", g.got, g.sent, err)
		}
		_, _ = g.out.Read(want[:k])
		if !bytes.Equal(buf[:k], want[:k]) {
			g.t.Fatalf("wrong bytes between %d and %d of %d", g.got, g.got+k, g.sent)
		}
		g.got += k
		n -= k
	}
}
