package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

// detached is a session's encodings and its socket.
func detached(t testing.TB, layer Layer, version, suite uint16) (*scripted, Socket, *State) {
	t.Helper()
	s := newScripted(t, layer, version, suite)
	sock, st, err := s.conn.Detach()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sock.Close() })
	return s, sock, st
}

// Nothing in an encoding is believed.
func TestImportRefuses(t *testing.T) {
	for _, tc := range []struct {
		name  string
		facts func(*facts)
		rec   func(*record)
	}{
		{name: "newer facts", facts: func(f *facts) { f.V = factsVersion + 1 }},
		{name: "newer record", rec: func(r *record) { r.V = recordVersion + 1 }},
		{name: "no version", rec: func(r *record) { r.V = 0 }},
		{name: "another session's record", rec: func(r *record) { r.ID = bytes.Repeat([]byte{1}, sessionIDLen) }},
		{name: "no id", facts: func(f *facts) { f.ID = nil }, rec: func(r *record) { r.ID = nil }},
		{name: "TLS 1.1", facts: func(f *facts) { f.Version = tls.VersionTLS11 }},
		{name: "suite of another version", facts: func(f *facts) { f.Version = tls.VersionTLS12 }},
		{name: "suite with another key length", facts: func(f *facts) { f.Suite = tls.TLS_AES_256_GCM_SHA384 }},
		{name: "CBC suite", facts: func(f *facts) { f.Version, f.Suite = tls.VersionTLS12, tls.TLS_RSA_WITH_AES_128_CBC_SHA }},
		{name: "unknown layer", facts: func(f *facts) { f.Layer = 7 }, rec: func(r *record) { r.Layer = 7 }},
		{name: "layers that differ", rec: func(r *record) { r.Layer = LayerKernel }},
		{name: "kernel layer with keys", facts: func(f *facts) { f.Layer = LayerKernel }, rec: func(r *record) { r.Layer = LayerKernel }},
		{name: "kernel layer on a plain socket", facts: func(f *facts) { f.Layer = LayerKernel },
			rec: func(r *record) { r.Layer, r.TX, r.RX = LayerKernel, nil, nil }},
		{name: "no sending keys", rec: func(r *record) { r.TX = nil }},
		{name: "no receiving keys", rec: func(r *record) { r.RX = nil }},
		{name: "short secret", rec: func(r *record) { r.TX.Secret = r.TX.Secret[:31] }},
		{name: "key beside the secret", rec: func(r *record) { r.RX.Key = make([]byte, 16) }},
		{name: "sequence number about to wrap", rec: func(r *record) { r.TX.Seq = 1<<64 - 2 }},
		{name: "too much ciphertext", rec: func(r *record) { r.Raw = make([]byte, bigBuf+1) }},
		{name: "too much plaintext", rec: func(r *record) { r.Plain = make([]byte, maxPlaintext+1) }},
		{name: "too much sealed", rec: func(r *record) { r.Sealed = make([]byte, 3*bigBuf) }},
		{name: "too much queued", rec: func(r *record) { r.Queued = make([]byte, MaxQueued+splicePipe+1) }},
		{name: "too much handshake", rec: func(r *record) { r.Hand = make([]byte, 1<<18) }},
		{name: "control record in software", rec: func(r *record) { r.Ctl, r.CtlTyp = []byte{1}, typeAlert }},
		{name: "unknown end", rec: func(r *record) { r.RXEnd = 9 }},
		{name: "unknown debts", rec: func(r *record) { r.Owed = owedFatal }},
		{name: "certificate that is none", facts: func(f *facts) { f.Certs = [][]byte{{1, 2, 3}} }},
		{name: "certificate index", facts: func(f *facts) { f.Peer = []int{0} }},
		{name: "negative certificate index", facts: func(f *facts) { f.Chains = [][]int{{-1}} }},
		{name: "too many chains", facts: func(f *facts) { f.Chains = make([][]int, maxChains+1) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, sock, st := detached(t, LayerSoftware, v13, gcm)
			f := *st.facts
			if tc.facts != nil {
				tc.facts(&f)
			}
			if tc.rec != nil {
				tc.rec(&st.record)
			}
			facts, err := cbor.Marshal(&f)
			if err != nil {
				t.Fatal(err)
			}
			rec, err := cbor.Marshal(&st.record)
			if err != nil {
				t.Fatal(err)
			}
			c, err := Import(sock, facts, rec)
			if err == nil {
				_ = c.Close()
				t.Fatal("imported")
			}
			if err := sock.Close(); err != nil {
				t.Errorf("the socket is not the caller's any more: %v", err)
			}
		})
	}
	t.Run("12", func(t *testing.T) {
		_, sock, st := detached(t, LayerSoftware, tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256)
		for name, change := range map[string]func(*record){
			"owed KeyUpdate": func(r *record) { r.Owed = owedUpdate },
			"long IV":        func(r *record) { k := *r.TX; k.IV = make([]byte, 12); r.TX = &k },
			"secret":         func(r *record) { k := *r.TX; k.Secret = make([]byte, 32); r.TX = &k },
		} {
			r := st.record
			change(&r)
			facts, _ := st.MarshalFacts()
			rec, err := cbor.Marshal(&r)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Import(sock, facts, rec); err == nil {
				t.Errorf("%s: imported", name)
			}
		}
	})
}

func TestImportRefusesOtherDescriptors(t *testing.T) {
	_, _, st := detached(t, LayerSoftware, v13, gcm)
	facts, _ := st.MarshalFacts()
	rec, err := st.MarshalRecord()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = r.Close(), w.Close() }()
	if _, err := Import(w, facts, rec); err == nil {
		t.Error("a pipe was imported")
	}
	if _, err := Import(nil, facts, rec); err == nil {
		t.Error("nothing was imported")
	}
	if _, err := Import(w, make([]byte, maxFacts+1), rec); err == nil {
		t.Error("oversized facts were read")
	}
}

// A kernel session needs a socket with keys of its own version and suite, both
// ways: without them plaintext would go out in the clear.
func TestImportChecksTheKernelSocket(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		if layer != LayerKernel {
			return
		}
		_, sock13, st13 := detached(t, layer, v13, gcm)
		_, sock12, st12 := detached(t, layer, tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384)
		for name, tc := range map[string]struct {
			sock Socket
			st   *State
		}{
			"1.3 state on a 1.2 socket": {sock12, st13},
			"1.2 state on a 1.3 socket": {sock13, st12},
			"a socket without keys": {func() Socket {
				_, s := tcpPair(t)
				return s
			}(), st13},
		} {
			facts, _ := tc.st.MarshalFacts()
			rec, err := tc.st.MarshalRecord()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Import(tc.sock, facts, rec); !errors.Is(err, ErrNoKernelTLS) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// Who gets what: facts hold no secret, a record of the kernel layer neither, and
// MarshalSecrets the traffic secrets.
func TestWhereSecretsAre(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			client := testClientTLS(t)
			client.MaxVersion = version
			conn, _ := connect(t, &Config{TLS: testServerTLS(t), Mode: modeOf(layer)}, client)
			sock, st, err := conn.Detach()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = sock.Close() }()
			enc := func(f func() ([]byte, error)) []byte {
				t.Helper()
				b, err := f()
				if err != nil {
					t.Fatal(err)
				}
				return b
			}
			facts, rec, sec := enc(st.MarshalFacts), enc(st.MarshalRecord), enc(st.MarshalSecrets)
			var ls ledgerSecrets
			if err := cbor.Unmarshal(sec, &ls); err != nil {
				t.Fatal(err)
			}
			secret := ls.TX.Secret
			if version == tls.VersionTLS12 {
				secret = ls.TX.Key
			}
			if len(secret) < 16 || ls.Version != version || !bytes.Equal(ls.ID, st.facts.ID) {
				t.Fatalf("secrets: %d bytes, %+v", len(secret), ls.Version)
			}
			if bytes.Contains(facts, secret) {
				t.Error("facts hold a secret")
			}
			if got := bytes.Contains(rec, secret); got != (layer == LayerSoftware) {
				t.Errorf("the %s layer's record holds a secret: %v", layer, got)
			}
			if layer == LayerKernel {
				// A worker has none to give.
				c, err := Import(duplicate(t, sock), facts, rec)
				if err != nil {
					t.Fatal(err)
				}
				s2, st2, err := c.Detach()
				if err != nil {
					t.Fatal(err)
				}
				_ = s2.Close()
				if _, err := st2.MarshalSecrets(); !errors.Is(err, ErrNoSecrets) {
					t.Errorf("a worker's secrets: %v", err)
				}
			}
			st.Wipe()
		}
	})
}

func FuzzImport(f *testing.F) {
	for _, tc := range testSuites {
		_, _, st := detached(f, LayerSoftware, tc.version, tc.suite)
		st.record.Raw, st.record.Plain = []byte{23, 3, 3, 0, 1}, []byte("plain")
		facts, _ := st.MarshalFacts()
		rec, err := st.MarshalRecord()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(facts, rec)
	}
	f.Fuzz(func(t *testing.T, facts, rec []byte) {
		c, s := tcpPair(t)
		defer func() { _, _ = c.SetLinger(0), c.Close() }()
		_, _ = c.Write([]byte("\x17\x03\x03\x00\x13garbage that is no record"))
		_ = c.CloseWrite()
		conn, err := Import(s, facts, rec)
		if err != nil {
			return
		}
		// Whatever it is, it must end, and close.
		if _, err := io.Copy(io.Discard, conn); err == nil && conn.rxEnd != endNotify {
			t.Error("garbage read as a clean end")
		}
		_ = c.Close()
		_ = conn.Close()
	})
}
