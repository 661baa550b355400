package ktls

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
)

// Server handshakes on c as the server and moves the session to its record layer.
// It owns c from the call on and closes it on error. The error is a
// *HandshakeError, except for a wrong Config. It returns after at most
// Config.HandshakeTimeout, or when ctx is done.
//
// The kernel layer needs a plain TCP socket: listen with
// net.ListenConfig.SetMultipathTCP(false), because Go listeners use MPTCP by
// default where the kernel has it.
func Server(ctx context.Context, c *net.TCPConn, cfg *Config) (*Conn, error) {
	base, err := cfg.serverBase()
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return handshake(ctx, c, cfg, false, func(w *wire) (*tls.Conn, error) {
		return tls.Server(w, base), nil
	})
}

// Client is Server for the other role: cfg.TLS needs ServerName, or
// InsecureSkipVerify. Sessions of TLS 1.3 are resumed from
// cfg.TLS.ClientSessionCache, and their tickets are stored in it as far as they come
// before the first data that follows one of them, and before the session moves; Read
// does that, as in crypto/tls. A session of TLS 1.2 is neither resumed nor stored.
func Client(ctx context.Context, c *net.TCPConn, cfg *Config) (*Conn, error) {
	return handshake(ctx, c, cfg, true, func(w *wire) (*tls.Conn, error) {
		conf, err := clientConfig(cfg.TLS, w)
		if err != nil {
			return nil, err
		}
		return tls.Client(w, conf), nil
	})
}

func handshake(ctx context.Context, c *net.TCPConn, cfg *Config, client bool, start func(*wire) (*tls.Conn, error)) (_ *Conn, err error) {
	w := &wire{Conn: c, client: client}
	defer w.wipe()
	stage := StageHello
	defer func() {
		if err != nil {
			_ = c.Close()
			err = w.explain(ctx, stage, err)
		}
	}()
	if cfg.Mode == ModeOff {
		return nil, ErrModeOff
	}
	kernel, reason, err := chooseBefore(c, cfg.Mode)
	if err != nil {
		return nil, err
	}
	tc, err := start(w)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(cfg.handshakeTimeout())); err != nil {
		return nil, err
	}
	if err := tc.HandshakeContext(ctx); err != nil {
		if w.started {
			stage = StageHandshake
		}
		return nil, err
	}
	stage = StageOffload
	if len(w.ahead) > 0 {
		return nil, errReadPast // cannot be, and would lose what the peer sent
	}
	// From here on tc does not touch the connection: its Close would seal an alert with
	// a sequence number that is ours.
	cs := tc.ConnectionState()
	if cfg.Established != nil {
		if err := cfg.Established(cs); err != nil {
			return nil, err
		}
	}
	conn, err := w.offload(c, &cs, cfg, kernel, reason)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		conn.layer.wipe()
		return nil, err
	}
	conn.tickets = w.keepTickets(tc, conn.p, cfg.TLS)
	return conn, nil
}

// chooseBefore decides, before anything is negotiated, whether the kernel layer is
// worth trying, and attaches the ULP: that works in ESTABLISHED only, so it must
// be now, while the peer can hardly have closed. It is transparent until keys are
// set.
func chooseBefore(c *net.TCPConn, mode Mode) (kernel bool, reason string, err error) {
	if mode == ModeSoftware {
		return false, "", softwareWorks()
	}
	ok, reason := kernelPossible()
	if ok {
		err = attachKernel(c)
		if err == nil {
			return true, "", nil
		}
		reason = err.Error()
	}
	if mode == ModeKernel {
		return false, "", fmt.Errorf("%w: %s", ErrNoKernelTLS, reason)
	}
	if err := softwareWorks(); err != nil {
		return false, "", fmt.Errorf("%w; kernel TLS: %s", err, reason)
	}
	return false, reason, nil
}

// offload makes the Conn of a finished handshake.
func (w *wire) offload(c *net.TCPConn, cs *tls.ConnectionState, cfg *Config, kernel bool, reason string) (*Conn, error) {
	mode := cfg.Mode
	p := params{version: cs.Version, suite: cs.CipherSuite, client: w.client}
	tx, rx, err := w.directions(p)
	defer tx.wipe()
	defer rx.wipe()
	if err != nil {
		return nil, w.refuse(c, p, tx, rx, err)
	}
	id := make([]byte, sessionIDLen)
	_, _ = rand.Read(id) // never fails
	f := newFacts(id, cs, w.client, c.LocalAddr(), c.RemoteAddr())
	if err := f.checkMovable(); err != nil {
		return nil, fmt.Errorf("the session could never move: %w", err)
	}

	if kernel {
		if kernel, reason = supportsKernel(p.version, p.suite); kernel && cfg.RequireRekey {
			kernel, reason = changesKeys(p.version)
		}
		if !kernel && mode == ModeKernel {
			return nil, fmt.Errorf("%w: %s", ErrNoKernelTLS, reason)
		}
	}
	var layer recordLayer
	if kernel {
		layer, err = newKernelLayer(c, p, &tx, &rx)
		switch {
		case err == nil:
		case mode == ModeAuto && errors.Is(err, errKernelUntouched):
			kernel, reason = false, err.Error()
		default:
			return nil, err
		}
	}
	var kept *secrets
	if kernel {
		f.Layer = LayerKernel
		kept = &secrets{tx: tx.clone(), rx: rx.clone()}
		layer.(*kernelLayer).secrets = kept //nolint:errcheck // newKernelLayer made it
	} else {
		f.Layer, f.Reason = LayerSoftware, reason
		if layer, err = newSoftLayer(c, p, tx.clone(), rx.clone()); err != nil {
			return nil, err
		}
	}
	conn := newConn(c, layer, p, f)
	conn.secrets = kept
	conn.local, conn.remote = c.LocalAddr(), c.RemoteAddr()
	return conn, nil
}

func (d *direction) clone() direction {
	return direction{secret: slices.Clone(d.secret), key: slices.Clone(d.key), iv: slices.Clone(d.iv), seq: d.seq}
}

// directions are the session's keys and the sequence numbers of its next records.
// With errFinished the keys are good all the same.
func (w *wire) directions(p params) (tx, rx direction, err error) {
	suite, err := lookupSuite(p.version, p.suite)
	if err != nil {
		return tx, rx, err
	}
	if p.version == tls.VersionTLS12 {
		return w.directions12(suite)
	}
	if w.err != nil {
		return tx, rx, w.err
	}
	if w.clientSecret == nil || w.serverSecret == nil {
		return tx, rx, errors.New("crypto/tls logged no traffic secrets")
	}
	client, err := suite.direction13(slices.Clone(w.clientSecret), 0)
	if err != nil {
		return tx, rx, err
	}
	if w.opener != nil {
		// The key that counted the tickets is the sending key, behind the last of them.
		return w.opener.dir.clone(), client, nil
	}
	server, err := suite.direction13(slices.Clone(w.serverSecret), 0)
	if err != nil {
		return tx, rx, err
	}
	if w.client {
		return client, server, nil
	}
	return server, client, nil
}

// directions12 also measures both Finished messages: that counts the records, and
// finds a handshake message that came in the same record as the peer's Finished,
// which crypto/tls would have lost.
func (w *wire) directions12(suite *suiteInfo) (tx, rx direction, err error) {
	if w.master == nil || !w.hello.done() {
		return tx, rx, errors.New("crypto/tls logged no master secret: a resumed TLS 1.2 session")
	}
	client, server := suite.directions12(w.master, w.clientRandom, w.hello.random())
	tx, rx = server, client
	if w.client {
		tx, rx = client, server
	}
	tx.seq, rx.seq = uint64(w.out.recs), uint64(w.in.recs)
	if !w.out.onlyFinished(suite) {
		return tx, rx, fmt.Errorf("our own Finished: %w", errFinished)
	}
	if !w.in.onlyFinished(suite) {
		return tx, rx, errFinished
	}
	return tx, rx, w.err
}

// finishedLen12 is a Finished message of TLS 1.2 (RFC 5246 section 7.4.9).
const finishedLen12 = 4 + 12

func (a *afterCCS) onlyFinished(suite *suiteInfo) bool {
	h := half{suite: suite}
	return !a.other && a.size-a.recs*h.sealedLen(0) == finishedLen12
}

// refuse ends a session whose handshake went further than it should have.
func (w *wire) refuse(c *net.TCPConn, p params, tx, rx direction, err error) error {
	if !errors.Is(err, errFinished) {
		return err
	}
	if l, lerr := newSoftLayer(c, p, tx.clone(), rx.clone()); lerr == nil {
		_, _ = l.writeControl(typeAlert, []byte{levelFatal, byte(alertUnexpectedMessage)}, false)
		l.wipe()
	}
	return &AlertError{Alert: alertUnexpectedMessage, Sent: true, What: err.Error()}
}

// explain makes the HandshakeError of a failed handshake.
func (w *wire) explain(ctx context.Context, stage Stage, err error) error {
	e := &HandshakeError{Stage: stage, Remote: w.RemoteAddr().String(), Err: err, notTLS: w.notTLS}
	switch {
	case w.notTLS:
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.timeout = true
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		e.gone = true
	}
	return e
}
