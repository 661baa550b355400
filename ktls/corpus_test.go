package ktls

import (
	"crypto/sha256"
	"crypto/tls"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

var updateCorpus = flag.Bool("update-corpus", false, "write testdata/fuzz anew, from real handshakes and exports")

// TestHostCorpus writes the corpora of the fuzz targets, with -update-corpus. The keys
// in them were those of sessions of a moment on the loopback.
func TestHostCorpus(t *testing.T) {
	if !*updateCorpus {
		return // go test runs every target with what is there
	}
	for _, tc := range []struct {
		name           string
		server, client func(*tls.Config)
	}{
		{"13", nil, nil},
		{"12", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, nil},
		{"retry", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }, nil},
		{"no tickets", func(c *tls.Config) { c.SessionTicketsDisabled = true }, nil},
		{"refused", nil, func(c *tls.Config) { c.NextProtos = []string{"unknown"} }},
	} {
		sent, received := recordHandshake(t, tc.server, tc.client)
		for _, size := range []uint8{4, 255} {
			writeCorpus(t, "FuzzWire", sent, size, false)
			writeCorpus(t, "FuzzWire", received, size, true)
		}
		writeCorpus(t, "FuzzStream", sent, uint8(100))
		if len(received) > recordHeaderLen {
			writeCorpus(t, "FuzzHello", received[recordHeaderLen:min(len(received), 200)], []byte{1, 40, 3})
		}
	}
	for _, sc := range testSuites {
		for _, bring := range []func(m *mover){
			func(m *mover) { m.echo("x") },
			func(m *mover) {
				rec := m.seal(typeData, []byte("opened, half read"))
				m.sendRaw(append(rec, m.seal(typeData, []byte("half"))[:9]...))
				m.wantRead("opened")
				m.conn.Unread([]byte("pushed back"))
				m.queue([]byte("queued"))
			},
			func(m *mover) { m.send(typeAlert, closeNotify); m.wantEOF() },
		} {
			m := &mover{scripted: newScripted(t, LayerSoftware, sc.version, sc.suite)}
			bring(m)
			_, st, err := m.conn.Detach()
			if err != nil {
				t.Fatal(err)
			}
			facts, _ := st.MarshalFacts()
			rec, err := st.MarshalRecord()
			if err != nil {
				t.Fatal(err)
			}
			writeCorpus(t, "FuzzImport", facts, rec)
		}
	}
	conn, _ := connect(t, &Config{TLS: testServerTLS(t), Mode: ModeSoftware}, testClientTLS(t))
	_, st, err := conn.Detach()
	if err != nil {
		t.Fatal(err)
	}
	facts, _ := st.MarshalFacts()
	rec, _ := st.MarshalRecord()
	writeCorpus(t, "FuzzImport", facts, rec)
}

// recordHandshake is what each side of a handshake between stock ends wrote.
func recordHandshake(t *testing.T, changeServer, changeClient func(*tls.Config)) (sent, received []byte) {
	t.Helper()
	c, s := tcpPair(t)
	server, client := testServerTLS(t), testClientTLS(t)
	if changeServer != nil {
		changeServer(server)
	}
	if changeClient != nil {
		changeClient(client)
	}
	a, b := &recorder{Conn: c}, &recorder{Conn: s}
	var wg sync.WaitGroup
	wg.Go(func() { _ = tls.Client(a, client).Handshake() })
	_ = tls.Server(b, server).Handshake()
	wg.Wait()
	return a.wrote, b.wrote
}

type recorder struct {
	net.Conn
	wrote []byte
}

func (r *recorder) Write(p []byte) (int, error) {
	r.wrote = append(r.wrote, p...)
	return r.Conn.Write(p)
}

// writeCorpus writes one input in the form that go test reads.
func writeCorpus(t *testing.T, target string, args ...any) {
	t.Helper()
	text := "go test fuzz v1\n"
	for _, a := range args {
		switch a := a.(type) {
		case []byte:
			text += fmt.Sprintf("[]byte(%q)\n", a)
		default:
			text += fmt.Sprintf("%T(%v)\n", a, a)
		}
	}
	dir := filepath.Join("testdata", "fuzz", target)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("real-%x", sha256.Sum256([]byte(text)))[:16]
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
