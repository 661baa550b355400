package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/fxamacker/cbor/v2"
)

const sessionIDLen = 16

// State is a session between two owners. It holds the session's secrets (in the
// kernel layer only when the handshake was made in this process): call Wipe when
// it is no longer needed.
type State struct {
	facts  *facts
	record record
	kernel *secrets // kernel layer; nil when this process never had them
}

// keys is one direction's key material in an encoding: of TLS 1.3 the secret only,
// from which the rest is derived.
type keys struct {
	Secret []byte `cbor:"1,keyasint,omitempty"`
	Key    []byte `cbor:"2,keyasint,omitempty"`
	IV     []byte `cbor:"3,keyasint,omitempty"`
	Seq    uint64 `cbor:"4,keyasint,omitempty"` // of the next record; 0 in secrets
	Gen    uint64 `cbor:"5,keyasint,omitempty"` // KeyUpdates since the handshake
}

func newKeys(d *direction, seq, gen uint64) *keys {
	k := &keys{Seq: seq, Gen: gen}
	if d.secret != nil {
		k.Secret = bytes.Clone(d.secret)
	} else {
		k.Key, k.IV = bytes.Clone(d.key), bytes.Clone(d.iv)
	}
	return k
}

func (k *keys) wipe() {
	if k != nil {
		clear(k.Secret)
		clear(k.Key)
		clear(k.IV)
		*k = keys{}
	}
}

// direction checks k. It copies. What is left out, in TLS 1.3 all but the secret, is
// derived when the first record needs it: many sessions move on before one does.
func (k *keys) direction(s *suiteInfo) (direction, error) {
	if k == nil {
		return direction{}, errors.New("no keys")
	}
	if k.Seq >= 1<<62 {
		return direction{}, fmt.Errorf("sequence number %d is out of range", k.Seq)
	}
	if s.version != tls.VersionTLS13 {
		if len(k.Secret) != 0 || len(k.Key) != s.keyLen || len(k.IV) != s.ivLen() {
			return direction{}, errors.New("key material of wrong length")
		}
		return direction{key: bytes.Clone(k.Key), iv: bytes.Clone(k.IV), seq: k.Seq}, nil
	}
	if len(k.Key) != 0 || len(k.IV) != 0 {
		return direction{}, errors.New("key material beside a traffic secret")
	}
	if len(k.Secret) != s.hashLen {
		return direction{}, fmt.Errorf("traffic secret of %d bytes, %d expected", len(k.Secret), s.hashLen)
	}
	return direction{secret: bytes.Clone(k.Secret), seq: k.Seq}, nil
}

// record is the moving part of a session.
type record struct {
	V     int    `cbor:"1,keyasint"`
	ID    []byte `cbor:"2,keyasint"`
	Layer Layer  `cbor:"3,keyasint"`

	// Software layer only.
	TX *keys `cbor:"4,keyasint,omitempty"`
	RX *keys `cbor:"5,keyasint,omitempty"`

	Raw    []byte     `cbor:"6,keyasint,omitempty"`  // received, not opened
	Plain  []byte     `cbor:"7,keyasint,omitempty"`  // opened, not read
	Sealed []byte     `cbor:"8,keyasint,omitempty"`  // sealed, not sent
	Ctl    []byte     `cbor:"9,keyasint,omitempty"`  // part of a control record
	CtlTyp recordType `cbor:"10,keyasint,omitempty"` // its type

	Unread []byte `cbor:"11,keyasint,omitempty"`
	Queued []byte `cbor:"12,keyasint,omitempty"`
	Hand   []byte `cbor:"13,keyasint,omitempty"`

	RXEnd  ending `cbor:"14,keyasint,omitempty"`
	TXEnd  ending `cbor:"15,keyasint,omitempty"`
	Owed   uint32 `cbor:"16,keyasint,omitempty"`
	Asked  uint32 `cbor:"17,keyasint,omitempty"`
	RXUsed uint64 `cbor:"18,keyasint,omitempty"`
	TXUsed uint64 `cbor:"19,keyasint,omitempty"`
	RXGen  uint64 `cbor:"20,keyasint,omitempty"`
	TXGen  uint64 `cbor:"21,keyasint,omitempty"`

	Empties    uint8 `cbor:"22,keyasint,omitempty"`
	Warnings   uint8 `cbor:"23,keyasint,omitempty"`
	Handshakes uint8 `cbor:"24,keyasint,omitempty"`

	Wire    uint64 `cbor:"25,keyasint,omitempty"` // kernel layer, see wirePosition
	WireSeq uint64 `cbor:"26,keyasint,omitempty"`

	RXPos uint64 `cbor:"27,keyasint,omitempty"` // software layer, see layerState
	TXPos uint64 `cbor:"28,keyasint,omitempty"`
}

// secrets are kept beside a kernel session by the process that made it.
type secrets struct {
	tx, rx direction
}

func (s *secrets) wipe() {
	if s != nil {
		s.tx.wipe()
		s.rx.wipe()
	}
}

// ledgerSecrets is what MarshalSecrets writes.
type ledgerSecrets struct {
	V       int    `cbor:"1,keyasint"`
	ID      []byte `cbor:"2,keyasint"`
	Version uint16 `cbor:"3,keyasint"`
	Suite   uint16 `cbor:"4,keyasint"`
	TX      *keys  `cbor:"5,keyasint"` // our sending direction
	RX      *keys  `cbor:"6,keyasint"`
}

// Detach ends this Conn without touching the connection: nothing more is read or
// written, and every later method gives net.ErrClosed. The caller must have made
// Read and Write return (a deadline in the past does that); Detach waits for them.
// The socket is the caller's afterwards, its deadlines as they were, together with
// the state for Import. While a relay changes its keys (Lent) a session cannot be
// detached: the error is ErrLent, and the Conn as before. A session that has ended by an alert or an error of the
// socket cannot be detached: Detach then fails and the Conn is as before.
func (c *Conn) Detach() (Socket, *State, error) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	c.wmu.Lock()
	defer c.wmu.Unlock()
	return c.detachLocked()
}

func (c *Conn) detachLocked() (Socket, *State, error) {
	if c.closed.Load() {
		return nil, nil, net.ErrClosed
	}
	if c.Lent() {
		return nil, nil, fmt.Errorf("session %s: %w", c.RemoteAddr(), ErrLent)
	}
	if f := c.fatal.Load(); f != nil {
		return nil, nil, fmt.Errorf("session %s has ended: %w", c.RemoteAddr(), *f)
	}
	if c.werr != nil && c.txEnd == endOpen {
		return nil, nil, fmt.Errorf("session %s has ended: %w", c.RemoteAddr(), c.werr)
	}
	if lost := c.lost.Load(); lost != nil { // the socket will not say it to a new owner
		return nil, nil, fmt.Errorf("session %s has ended: %w", c.RemoteAddr(), *lost)
	}
	if err := c.layer.broken(); err != nil {
		// The socket has forgotten the error; a new owner would wait for ever.
		_ = c.readFailed(err)
		_ = c.payOwed(false) // the alert; what does not go out now stays owed until Close
		return nil, nil, fmt.Errorf("session %s has ended: %w", c.RemoteAddr(), c.readEnd())
	}
	if !c.markClosed() {
		return nil, nil, net.ErrClosed
	}
	var st layerState
	c.layer.export(&st)
	s := &State{facts: c.facts, kernel: c.secrets}
	unread, queued := slices.Clone(c.unread), c.queued
	if k := c.commits; k != nil && !k.stateOnly {
		unread, queued = append(k.uncommitted(), unread...), slices.Clone(queued)
	}
	s.record = record{
		V: recordVersion, ID: c.facts.ID, Layer: c.layer.kind(),
		Raw: st.raw, Plain: st.plain, Sealed: st.sealed, Ctl: st.ctl, CtlTyp: st.typ,
		Unread: unread, Queued: queued, Hand: slices.Clone(c.hand),
		RXEnd: c.rxEnd, TXEnd: c.txEnd, Owed: c.owed.Load() | c.rel.owed(), Asked: c.asked.Load(),
		RXUsed: c.rxUsed, TXUsed: c.txUsed, RXGen: c.rxGen, TXGen: c.txGen,
		Wire: st.wire, WireSeq: st.wireSeq, RXPos: st.rxPos, TXPos: st.txPos,
		Empties: c.floods.empties, Warnings: c.floods.warnings, Handshakes: c.floods.handshakes,
	}
	if c.layer.kind() == LayerSoftware {
		s.record.TX = newKeys(&st.tx, st.tx.seq, c.txGen)
		s.record.RX = newKeys(&st.rx, st.rx.seq, c.rxGen)
	}
	st.tx.wipe()
	st.rx.wipe()
	c.layer.wipe()
	c.place.Store(nil)
	c.rel.end()
	c.secrets, c.unread, c.queued, c.hand, c.commits = nil, nil, nil, nil, nil
	c.buffered.Store(0)
	c.pending.Store(0)
	c.dropTickets()
	return c.sock, s, nil
}

// Layer says where the session's records are sealed and opened.
func (s *State) Layer() Layer { return s.record.Layer }

// MarshalFacts encodes what is known of the session since its handshake, in CBOR:
// version, suite, names, certificates, addresses. No secrets.
func (s *State) MarshalFacts() ([]byte, error) {
	b, err := cbor.Marshal(s.facts)
	if err != nil {
		return nil, fmt.Errorf("encode session facts: %w", err)
	}
	return b, nil
}

// MarshalRecord encodes the moving part of the session, in CBOR: buffers and
// flags, and in the software layer keys and sequence numbers. A record that was
// imported once is void: importing it again would use sequence numbers twice.
func (s *State) MarshalRecord() ([]byte, error) {
	if s.record.Layer == LayerSoftware && s.record.TX == nil {
		return nil, errors.New("encode session record: the state was wiped")
	}
	return s.record.encode(make([]byte, 0, s.record.size())), nil
}

// MarshalSecrets encodes the current traffic secrets and their generation (TLS
// 1.3) or keys (TLS 1.2), in CBOR, for whoever changes keys on behalf of the
// owner. ErrNoSecrets when this process never had them.
func (s *State) MarshalSecrets() ([]byte, error) {
	ls := ledgerSecrets{V: recordVersion, ID: s.facts.ID, Version: s.facts.Version, Suite: s.facts.Suite}
	switch {
	case s.record.Layer == LayerSoftware && s.record.TX != nil:
		tx, rx := *s.record.TX, *s.record.RX
		tx.Seq, rx.Seq = 0, 0
		ls.TX, ls.RX = &tx, &rx
	case s.kernel != nil:
		ls.TX = newKeys(&s.kernel.tx, 0, s.record.TXGen)
		ls.RX = newKeys(&s.kernel.rx, 0, s.record.RXGen)
		defer ls.TX.wipe()
		defer ls.RX.wipe()
	default:
		return nil, ErrNoSecrets
	}
	b, err := cbor.Marshal(&ls)
	if err != nil {
		return nil, fmt.Errorf("encode session secrets: %w", err)
	}
	return b, nil
}

// Wipe zeroes the state's secrets. Encodings already made are the caller's.
func (s *State) Wipe() {
	s.record.TX.wipe()
	s.record.RX.wipe()
	s.record.TX, s.record.RX = nil, nil
	s.kernel.wipe()
	s.kernel = nil
}
