package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// program finds a client. CI has all of them; elsewhere one may be missing.
func program(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
		return path
	case os.Getenv("CI") == "true":
		t.Fatalf("%v; the package %s has it", err, pkg)
	default:
		t.Skipf("%v; the package %s has it", err, pkg)
	}
	return ""
}

// A stock client with its standard streams in our hands.
type client struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	done chan error
	// patience is how long to wait for what it says.
	patience time.Duration

	mu  sync.Mutex
	out bytes.Buffer
}

func (c *client) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(b)
}

func (c *client) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.String()
}

func startClient(t *testing.T, name string, argv ...string) *client {
	t.Helper()
	c := &client{t: t, name: name, cmd: exec.Command(argv[0], argv[1:]...), done: make(chan error, 1), patience: patience}
	c.cmd.Stdout, c.cmd.Stderr = c, c
	c.cmd.WaitDelay = time.Second
	var err error
	if c.in, err = c.cmd.StdinPipe(); err == nil {
		err = c.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		c.done <- c.cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("%s said:\n%s", c.name, c.text())
		}
	})
	return c
}

func (c *client) say(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, line); err != nil {
		c.t.Fatalf("%s: %v", c.name, err)
	}
}

// hear waits until the client has printed text n times.
func (c *client) hear(text string, n int) {
	c.t.Helper()
	deadline := time.Now().Add(c.patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for strings.Count(c.text(), text) < n {
		if time.Now().After(deadline) {
			c.t.Fatalf("%s has not printed %q %d times", c.name, text, n)
		}
		<-tick.C
	}
}

// ends waits for the end of the client, which must be a good one.
func (c *client) ends() {
	c.t.Helper()
	select {
	case err := <-c.done:
		if err != nil {
			c.t.Errorf("%s: %v", c.name, err)
		}
	case <-time.After(patience):
		c.t.Errorf("%s has not ended", c.name)
	}
}

const pythonClient = `
import socket, ssl, sys
ctx = ssl.create_default_context()
ctx.check_hostname = False
ctx.verify_mode = ssl.CERT_NONE
if sys.argv[3] == "1.2":
    ctx.maximum_version = ssl.TLSVersion.TLSv1_2
else:
    ctx.minimum_version = ssl.TLSVersion.TLSv1_3
raw = socket.create_connection((sys.argv[1], int(sys.argv[2])))
s = ctx.wrap_socket(raw, suppress_ragged_eofs=False)
print(s.version(), flush=True)
for line in sys.stdin.buffer:
    s.sendall(line)
    got = b""
    while len(got) < len(line):
        more = s.recv(len(line) - len(got))
        if not more:
            sys.exit("ended too early")
        got += more
    if got != line:
        sys.exit("%r came back as %r" % (line, got))
    sys.stdout.write("echo: " + got.decode())
    sys.stdout.flush()
s.unwrap()
print("unwrapped", flush=True)
`

// Stock clients of every kind stay connected to the echo worker through an upgrade,
// an upgrade of the supervisor, its kill -9 and another upgrade; the ones that can
// change their keys in between do.
func TestHostStockClientsStayConnected(t *testing.T) {
	u := start(t, visor.Options{})
	host, port, err := net.SplitHostPort(u.Addr)
	if err != nil {
		t.Fatal(err)
	}
	type kind struct {
		c     *client
		rekey []string // said between two steps
		ack   string   // printed for each of them; lines that come too soon it would swallow
		acks  int
		quit  string // the last word; "" is the end of input
		after string // printed in a good end
	}
	var all []*kind
	add := func(name, prog, pkg string, k kind, args ...string) {
		t.Helper()
		path, err := exec.LookPath(prog)
		if err != nil {
			if os.Getenv("CI") == "true" {
				t.Errorf("%v; the package %s has it", err, pkg)
			} else {
				t.Logf("left out: %s: %v; the package %s has it", name, err, pkg)
			}
			return
		}
		k.c = startClient(t, name, append([]string{path}, args...)...)
		all = append(all, &k)
	}
	add("openssl, TLS 1.3 with KeyUpdates", "openssl", "openssl", kind{rekey: []string{"K\n", "k\n"}, ack: "KEYUPDATE", quit: "Q\n"}, "s_client", "-connect", u.Addr, "-tls1_3")
	add("openssl, TLS 1.2", "openssl", "openssl", kind{quit: "Q\n"}, "s_client", "-connect", u.Addr, "-tls1_2")
	add("openssl, ChaCha20", "openssl", "openssl", kind{rekey: []string{"K\n"}, ack: "KEYUPDATE", quit: "Q\n"}, "s_client", "-connect", u.Addr, "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256")
	add("openssl, AES-256", "openssl", "openssl", kind{quit: "Q\n"}, "s_client", "-connect", u.Addr, "-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384")
	add("gnutls, TLS 1.3 with rekeying", "gnutls-cli", "gnutls-bin", kind{rekey: []string{"^rekey^\n", "^rekey1^\n"}, ack: "Rekey was completed"},
		"--inline-commands", "--insecure", "--priority", "NORMAL:-VERS-ALL:+VERS-TLS1.3", "-p", port, host)
	add("gnutls, TLS 1.2", "gnutls-cli", "gnutls-bin", kind{}, "--insecure", "--priority", "NORMAL:-VERS-ALL:+VERS-TLS1.2", "-p", port, host)
	// An echo is no HTTP, so curl takes it for version 0.9.
	add("curl, full duplex", "curl", "curl", kind{quit: "-"}, "-sN", "-k", "--http0.9", "--http1.1", "-H", "Expect:", "-T", ".", "https://"+u.Addr+"/")
	for _, v := range []string{"1.2", "1.3"} {
		add("python, TLS "+v, "python3", "python3", kind{after: "unwrapped"}, "-c", pythonClient, host, port, v)
	}
	if len(all) == 0 {
		t.Skip("none of the clients is here")
	}
	steps := 0
	everybodyTalks := func() {
		t.Helper()
		steps++
		line := fmt.Sprintf("line number %d\n", steps)
		for _, k := range all {
			k.c.say(line)
		}
		for _, k := range all {
			k.c.hear(strings.TrimSpace(line), 1)
		}
	}
	rekey := func() {
		for _, k := range all {
			for _, word := range k.rekey {
				k.c.say(word)
				k.acks++
				k.c.hear(k.ack, k.acks)
			}
		}
	}
	everybodyTalks()
	u.settled(len(all))
	for _, step := range [][]string{{"upgrade"}, {"upgrade", "--supervisor"}, nil, {"upgrade"}} {
		rekey()
		if step == nil {
			u.killSupervisor()
		} else {
			u.run(0, step...)
		}
		everybodyTalks()
		rekey()
		everybodyTalks()
	}
	u.settled(len(all))
	for _, k := range all {
		if k.quit == "-" { // no echo ever ends, so curl waits for one that does
			_ = k.c.cmd.Process.Kill()
			<-k.c.done
			continue
		}
		if k.quit != "" {
			k.c.say(k.quit)
		} else {
			k.c.in.Close()
		}
		k.c.ends()
		if !strings.Contains(k.c.text(), k.after) {
			t.Errorf("%s did not print %q", k.c.name, k.after)
		}
	}
	st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.Lost+c.Interrupted+c.ClosedUnknown+c.ClosedByOwner != 0 || c.ClosedByPeer != uint64(len(all)) {
		t.Errorf("counters %+v, reasons %v", c, st.Reasons)
	}
}

// A session ticket of one supervisor is good for the next, planned or not.
func TestHostTicketsOutliveTheSupervisor(t *testing.T) {
	openssl := program(t, "openssl", "openssl")
	u := start(t, visor.Options{})
	ticket := filepath.Join(tempDir(t), "ticket")
	connect := func(want string, args ...string) {
		t.Helper()
		c := startClient(t, "openssl", append([]string{openssl, "s_client", "-connect", u.Addr, "-tls1_3"}, args...)...)
		c.say("hello\n")
		c.hear("\nhello\n", 1)
		c.say("Q\n")
		c.ends()
		if !strings.Contains(c.text(), want) {
			t.Errorf("it does not say %q", want)
		}
	}
	connect("New, TLSv1.3", "-sess_out", ticket)
	connect("Reused, TLSv1.3", "-sess_in", ticket)
	u.run(0, "upgrade", "--supervisor")
	connect("Reused, TLSv1.3", "-sess_in", ticket)
	u.killSupervisor()
	connect("Reused, TLSv1.3", "-sess_in", ticket)
	u.run(0, "upgrade")
	connect("Reused, TLSv1.3", "-sess_in", ticket)
	if st := u.settled(0); st.Counters.Accepted != 5 {
		t.Errorf("counters %+v", st.Counters)
	}
}
