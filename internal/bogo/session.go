package bogo

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// alertDecompressionFailure is the alert that the runner asks for because nobody
// sends it for another reason (RFC 5246 section 7.2.2).
const alertDecompressionFailure ktls.Alert = 30

// firstWrite is what a shim that writes first writes.
const firstWrite = "hello"

// session is one session of a test.
type session struct {
	*options
	ctx     context.Context
	conn    *ktls.Conn
	secrets trafficSecrets
	exports []byte // keying material, taken when the handshake ended
	cache   *countingCache
	stored  int    // tickets stored before this session
	kept    []byte // the secrets of a kernel session that moves
}

// established is called between the handshake and the first record of ours.
func (s *session) established(cs tls.ConnectionState) error {
	if s.exportKeyingMaterial == 0 {
		return nil
	}
	var context []byte
	if s.useExportContext {
		context = []byte(s.exportContext)
		if context == nil {
			context = []byte{}
		}
	}
	var err error
	if s.exports, err = cs.ExportKeyingMaterial(s.exportLabel, context, s.exportKeyingMaterial); err != nil {
		return fmt.Errorf("failed to export keying material: %w", err)
	}
	return nil
}

// exchange is what the runner wants of every session: some bytes first, then an
// echo with every bit flipped, then an end in order.
func (s *session) exchange() error {
	cs := s.conn.ConnectionState()
	if err := s.checkHandshake(cs); err != nil {
		return err
	}
	if s.mode == ktls.ModeKernel && s.conn.Layer() != ktls.LayerKernel {
		return fmt.Errorf("the session is in the %s layer: %s", s.conn.Layer(), s.conn.LayerReason())
	}
	if err := s.before(cs); err != nil {
		return err
	}
	switch {
	case s.sendAlert:
		return s.conn.Abort(alertDecompressionFailure)
	case s.differentRecordSizes:
		if err := s.writeSizes(); err != nil {
			return err
		}
	case !s.shutsDown:
		if err := s.echo(); err != nil {
			return err
		}
	}
	if err := s.shutdown(); err != nil {
		return err
	}
	return s.after()
}

// before sends what comes before the echo.
func (s *session) before(cs tls.ConnectionState) error {
	out := s.exports
	if s.exportTrafficSecrets {
		read, write := s.secrets.server, s.secrets.client
		if s.server {
			read, write = write, read
		}
		if len(read) == 0 || len(read) != len(write) {
			return errors.New("the key log has no traffic secrets")
		}
		out = binary.LittleEndian.AppendUint16(out, uint16(len(read)))
		out = append(append(out, read...), write...)
	}
	if s.tlsUnique {
		//nolint:staticcheck // what the test is about
		unique := cs.TLSUnique
		if len(unique) != 12 {
			return fmt.Errorf("failed to get tls-unique: %d bytes", len(unique))
		}
		out = append(out, unique...)
	}
	if len(out) > 0 {
		if _, err := s.conn.Write(out); err != nil {
			return err
		}
	}
	switch {
	case s.unfinishedWrite:
		return s.leaveUnfinished()
	case s.writesFirst && !s.differentRecordSizes:
		_, err := s.conn.Write([]byte(firstWrite))
		return err
	}
	return nil
}

// leaveUnfinished writes without sending: the software layer seals the record and
// keeps it, the kernel's takes nothing, and then the bytes wait unsealed.
func (s *session) leaveUnfinished() error {
	_ = s.conn.SetWriteDeadline(time.Unix(1, 0))
	n, err := s.conn.Write([]byte(firstWrite))
	_ = s.conn.SetWriteDeadline(time.Time{})
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("a write with a deadline in the past took %d bytes: %w", n, err)
	}
	return s.conn.QueueWrite([]byte(firstWrite)[n:])
}

// writeSizes writes in lengths around those of records.
func (s *session) writeSizes() error {
	for _, n := range []int{0, 1, 255, 256, 257, 16383, 16384, 16385, 32767, 32768, 32769} {
		if _, err := s.conn.Write(bytes.Repeat([]byte{0x42}, n)); err != nil {
			return err
		}
	}
	return nil
}

// echo returns nil when the peer has ended the session, cleanly or not.
func (s *session) echo() error {
	buf := make([]byte, s.readSize)
	for {
		if s.keyUpdateBeforeRead {
			if err := s.conn.KeyUpdate(false); err != nil {
				return err
			}
		}
		if s.move {
			if err := s.moveOn(); err != nil {
				return err
			}
		}
		n, err := s.read(buf)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, ktls.ErrTruncated) && !s.checkCloseNotify:
			return nil
		case err != nil:
			return err
		}
		if s.keyUpdate {
			if err := s.conn.KeyUpdate(false); err != nil {
				return err
			}
		}
		for i := range buf[:n] {
			buf[i] ^= 0xff
		}
		if _, err := s.conn.Write(buf[:n]); err != nil {
			return err
		}
	}
}

// pollEvery is how long an asynchronous read waits before it looks again.
const pollEvery = time.Millisecond

// read reads once. An asynchronous one is a row of reads that a deadline ends, of
// which none may lose a byte.
func (s *session) read(buf []byte) (int, error) {
	end, _ := s.ctx.Deadline()
	if !s.async {
		_ = s.conn.SetReadDeadline(end)
	}
	n, err := 0, error(nil)
	for {
		if s.async {
			_ = s.conn.SetReadDeadline(time.Now().Add(pollEvery))
		}
		n, err = s.conn.Read(buf)
		if !s.async || !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end) {
			break
		}
	}
	if err != nil || !s.peekThenRead {
		return n, err
	}
	// Looking ahead is reading and pushing back: the same bytes again, at once.
	s.conn.Unread(buf[:n])
	again := make([]byte, n)
	if _, err := io.ReadFull(s.conn, again); err != nil {
		return 0, err
	}
	if !bytes.Equal(again, buf[:n]) {
		return 0, errors.New("what was pushed back is not what was read then")
	}
	return n, nil
}

// moveOn takes the session apart and puts it together again, as between two
// processes.
func (s *session) moveOn() error {
	sock, state, err := s.conn.Detach()
	if err != nil {
		return err
	}
	defer state.Wipe()
	facts, err := state.MarshalFacts()
	if err != nil {
		return err
	}
	record, err := state.MarshalRecord()
	if err != nil {
		return err
	}
	// The next owner can change the keys of a kernel session only when it is given the
	// secrets, which TLS 1.2 does not need.
	if state.Layer() == ktls.LayerKernel && s.conn.ConnectionState().Version == tls.VersionTLS13 {
		if s.kept, err = state.MarshalSecrets(); err != nil {
			return err
		}
	}
	if s.conn, err = ktls.Import(sock, facts, record); err != nil {
		return err
	}
	return s.conn.SetSecrets(s.kept)
}

// errDataOnShutdown is data from a peer that should have had nothing more to say.
var errDataOnShutdown = errors.New("application data after our close_notify")

// shutdown ends the session in order. Without checkCloseNotify nobody looks
// whether it was.
func (s *session) shutdown() error {
	if !s.checkCloseNotify && !s.shutsDown {
		return nil
	}
	err := s.conn.CloseWrite()
	if !s.checkCloseNotify {
		return nil // the runner may be gone already
	}
	if s.move {
		if err := s.moveOn(); err != nil {
			return err
		}
	}
	n, rerr := s.read(make([]byte, 1))
	switch {
	case n > 0:
		return errDataOnShutdown
	case errors.Is(rerr, io.EOF):
		return err // of a peer that was too quick to be sent ours, perhaps
	}
	return fmt.Errorf("no clean end: %w", rerr)
}

// after checks what can only be known at the end.
func (s *session) after() error {
	got := s.cache.count() > s.stored
	switch {
	case s.expectTicketRenewal && !got:
		return errors.New("no new ticket")
	case s.expectNoSession && got:
		return errors.New("there is a ticket, and should be none")
	case s.expectTotalReneg > 0:
		return fmt.Errorf("no renegotiation; %d expected", s.expectTotalReneg)
	}
	return nil
}
