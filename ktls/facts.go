package ktls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
)

// factsVersion is the newest encoding of facts, recordVersion of a record state.
// A reader refuses newer ones and ignores fields it does not know.
const (
	factsVersion  = 1
	recordVersion = 1
)

// Limits of what Import reads, in bytes and entries.
const (
	maxFacts  = 1 << 20
	maxRecord = 4 << 20
	maxCerts  = 64
	maxChains = 16
	maxSCTs   = 1024
)

// facts is what is known of a session since its handshake. It holds no secret and
// is never modified.
type facts struct {
	V       int    `cbor:"1,keyasint"`
	ID      []byte `cbor:"2,keyasint"` // 16 random bytes that tie facts and record together
	Version uint16 `cbor:"3,keyasint"`
	Suite   uint16 `cbor:"4,keyasint"`
	Client  bool   `cbor:"5,keyasint,omitempty"` // our role
	Layer   Layer  `cbor:"6,keyasint"`
	Reason  string `cbor:"7,keyasint,omitempty"`

	ServerName string `cbor:"8,keyasint,omitempty"`
	Protocol   string `cbor:"9,keyasint,omitempty"`
	Resumed    bool   `cbor:"10,keyasint,omitempty"`
	Curve      uint16 `cbor:"11,keyasint,omitempty"`
	ECH        bool   `cbor:"12,keyasint,omitempty"`
	HRR        bool   `cbor:"13,keyasint,omitempty"`

	Certs     [][]byte `cbor:"14,keyasint,omitempty"` // DER, each once
	Peer      []int    `cbor:"15,keyasint,omitempty"` // indices into Certs
	Chains    [][]int  `cbor:"16,keyasint,omitempty"`
	SCTs      [][]byte `cbor:"17,keyasint,omitempty"`
	OCSP      []byte   `cbor:"18,keyasint,omitempty"`
	TLSUnique []byte   `cbor:"19,keyasint,omitempty"`

	Local  string `cbor:"20,keyasint,omitempty"`
	Remote string `cbor:"21,keyasint,omitempty"`

	parsed []*x509.Certificate // of Certs
}

var cborDecode = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		MaxNestedLevels:  8,
		MaxArrayElements: 1024,
		MaxMapPairs:      64,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
	}.DecMode()
	if err != nil {
		panic(err) // the options above are constants
	}
	return m
}()

// newFacts takes what the handshake left behind, without the reference to its
// secrets that a tls.ConnectionState carries.
func newFacts(id []byte, cs *tls.ConnectionState, client bool, local, remote net.Addr) *facts {
	f := &facts{
		V: factsVersion, ID: id, Client: client,
		Version: cs.Version, Suite: cs.CipherSuite,
		ServerName: cs.ServerName, Protocol: cs.NegotiatedProtocol, Resumed: cs.DidResume,
		Curve: uint16(cs.CurveID), ECH: cs.ECHAccepted, HRR: cs.HelloRetryRequest,
		SCTs: cs.SignedCertificateTimestamps, OCSP: cs.OCSPResponse,
		TLSUnique: cs.TLSUnique, //nolint:staticcheck // TLS 1.2 channel binding, passed on as it is
		Local:     addrString(local), Remote: addrString(remote),
	}
	index := func(list []*x509.Certificate) []int {
		var out []int
		for _, cert := range list {
			i := slices.IndexFunc(f.parsed, cert.Equal)
			if i < 0 {
				i = len(f.parsed)
				f.parsed = append(f.parsed, cert)
				f.Certs = append(f.Certs, cert.Raw)
			}
			out = append(out, i)
		}
		return out
	}
	f.Peer = index(cs.PeerCertificates)
	for _, chain := range cs.VerifiedChains {
		f.Chains = append(f.Chains, index(chain))
	}
	return f
}

// addrString is a.String(), which takes longer for the addresses of sockets.
func addrString(a net.Addr) string {
	t, ok := a.(*net.TCPAddr)
	if !ok || t == nil {
		return a.String()
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

// connectionState builds a new value each time, which the caller may modify.
func (f *facts) connectionState() tls.ConnectionState {
	certs := func(idx []int) []*x509.Certificate {
		var out []*x509.Certificate
		for _, i := range idx {
			out = append(out, f.parsed[i])
		}
		return out
	}
	cs := tls.ConnectionState{
		Version: f.Version, CipherSuite: f.Suite, HandshakeComplete: true,
		ServerName: f.ServerName, NegotiatedProtocol: f.Protocol,
		//lint:ignore SA1019 crypto/tls still sets the deprecated field, so we do
		NegotiatedProtocolIsMutual: true,
		DidResume:                  f.Resumed, CurveID: tls.CurveID(f.Curve), ECHAccepted: f.ECH, HelloRetryRequest: f.HRR,
		SignedCertificateTimestamps: slices.Clone(f.SCTs), OCSPResponse: slices.Clone(f.OCSP),
		TLSUnique:        slices.Clone(f.TLSUnique),
		PeerCertificates: certs(f.Peer),
	}
	for _, chain := range f.Chains {
		cs.VerifiedChains = append(cs.VerifiedChains, certs(chain))
	}
	return cs
}

// addrOf is an address as the handshake saw it.
func addrOf(text string) net.Addr {
	ap, err := netip.ParseAddrPort(text)
	if err != nil {
		return &net.TCPAddr{}
	}
	return net.TCPAddrFromAddrPort(ap)
}

func (f *facts) hasAddresses() bool {
	for _, text := range []string{f.Local, f.Remote} {
		if _, err := netip.ParseAddrPort(text); err != nil {
			return false
		}
	}
	return true
}

func (f *facts) params() params {
	return params{version: f.Version, suite: f.Suite, client: f.Client}
}

// checkSize applies the limits of Import that a peer decides about.
func (f *facts) checkSize() error {
	if len(f.Certs) > maxCerts || len(f.Chains) > maxChains {
		return fmt.Errorf("%d certificates in %d chains, the limits are %d and %d", len(f.Certs), len(f.Chains), maxCerts, maxChains)
	}
	for _, idx := range append([][]int{f.Peer}, f.Chains...) {
		if len(idx) > maxCerts {
			return fmt.Errorf("chain of %d certificates, the limit is %d", len(idx), maxCerts)
		}
	}
	if len(f.SCTs) > maxSCTs {
		return fmt.Errorf("%d certificate timestamps, the limit is %d", len(f.SCTs), maxSCTs)
	}
	return nil
}

// checkMovable makes sure that Import will take f, so that no session is made that
// nobody could continue.
func (f *facts) checkMovable() error {
	if err := f.checkSize(); err != nil {
		return err
	}
	if !utf8.ValidString(f.ServerName) || !utf8.ValidString(f.Protocol) {
		return errors.New("the names that were negotiated are not valid text")
	}
	if f.roughSize() <= maxFacts {
		return nil // without encoding it only to see how long that is
	}
	b, err := cbor.Marshal(f)
	if err != nil {
		return err
	}
	if len(b) > maxFacts {
		return fmt.Errorf("%d bytes, the limit is %d", len(b), maxFacts)
	}
	return nil
}

// roughSize is more than the length of the encoding.
func (f *facts) roughSize() int {
	const entry = 16 // a length or a number, with its key
	n := len(f.ID) + len(f.Reason) + len(f.ServerName) + len(f.Protocol) + len(f.OCSP) + len(f.TLSUnique) +
		len(f.Local) + len(f.Remote) + 32*entry
	for _, list := range [][][]byte{f.Certs, f.SCTs} {
		for _, b := range list {
			n += len(b) + entry
		}
	}
	n += len(f.Peer) * entry
	for _, idx := range f.Chains {
		n += (len(idx) + 1) * entry
	}
	return n
}

// decodeFacts reads facts from another process and checks all of it.
func decodeFacts(b []byte) (*facts, error) {
	if len(b) > maxFacts {
		return nil, fmt.Errorf("%d bytes, the limit is %d", len(b), maxFacts)
	}
	f := &facts{}
	if !f.decode(b) {
		*f = facts{} // what was read of it so far
		if err := cborDecode.Unmarshal(b, f); err != nil {
			return nil, err
		}
	}
	if f.V < 1 || f.V > factsVersion {
		return nil, fmt.Errorf("encoding version %d, this program reads up to %d", f.V, factsVersion)
	}
	if len(f.ID) != sessionIDLen {
		return nil, errors.New("bad session id")
	}
	if _, err := lookupSuite(f.Version, f.Suite); err != nil {
		return nil, err
	}
	if f.Layer != LayerSoftware && f.Layer != LayerKernel {
		return nil, fmt.Errorf("unknown record layer %d", uint8(f.Layer))
	}
	if err := f.checkSize(); err != nil {
		return nil, err
	}
	for _, der := range f.Certs {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		f.parsed = append(f.parsed, cert)
	}
	for _, idx := range append([][]int{f.Peer}, f.Chains...) {
		for _, i := range idx {
			if i < 0 || i >= len(f.parsed) {
				return nil, fmt.Errorf("certificate %d of %d", i, len(f.parsed))
			}
		}
	}
	return f, nil
}
