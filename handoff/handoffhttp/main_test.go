package handoffhttp_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/handoff/handoffhttp"
	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// The test binary is the program that upgrades itself.
const (
	childEnv   = "KTLSVISOR_TEST_HTTP"
	addrEnv    = "KTLSVISOR_TEST_HTTP_ADDR"
	pidFileEnv = "KTLSVISOR_TEST_HTTP_PID"
	protoEnv   = "KTLSVISOR_TEST_HTTP_PROTO"
)

const patience = 30 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func mux() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /pid", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%d %x %s", os.Getpid(), r.TLS.Version, r.TLS.ServerName)
	})
	m.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		_, _ = w.Write(b)
	})
	m.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex() // HTTP/2 has it anyway
		fmt.Fprintln(w, os.Getpid())
		_ = http.NewResponseController(w).Flush()
		_, _ = io.Copy(w, r.Body) // until the client ends it
	})
	m.HandleFunc("/take", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "lines")
		w.WriteHeader(http.StatusSwitchingProtocols)
		if err := handoffhttp.Takeover(w, "lines"); err != nil {
			log.Print(err)
		}
	})
	return m
}

// lines answers each line with the process's pid and the number of lines so far, which is
// the state that moves.
func lines(_ context.Context, c *handoff.Conn) error {
	n, _ := strconv.Atoi(string(c.State()))
	var line []byte
	var b [1]byte
	for {
		if _, err := c.Read(b[:]); err != nil {
			if errors.Is(err, handoff.ErrMoving) {
				c.Unread(line)
				c.SetState([]byte(strconv.Itoa(n)))
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if line = append(line, b[0]); b[0] == '\n' {
			n++
			if _, err := fmt.Fprintf(c, "%d %d %s", os.Getpid(), n, line); err != nil {
				return err
			}
			line = nil
		}
	}
}

func child() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, about, about, &key.PublicKey, key)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: mux(), ReadHeaderTimeout: 2 * time.Second, IdleTimeout: time.Minute}
	u, err := handoff.NewUpgrader(handoffhttp.New(srv, handoffhttp.WithTakeover("lines", handoff.HandlerFunc(lines))),
		handoff.WithPIDFile(os.Getenv(pidFileEnv)), handoff.WithUpgradeOn(syscall.SIGHUP),
		handoff.WithFreezeTimeout(300*time.Millisecond), handoff.WithMoveTime(time.Second),
		handoff.WithLogger(hclog.New(&hclog.LoggerOptions{Output: os.Stderr, Level: hclog.Debug})))
	if err != nil {
		return err
	}
	_, err = u.Listen("tcp", os.Getenv(addrEnv), &ktls.Config{TLS: &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: strings.Fields(os.Getenv(protoEnv))}})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { // the test's end is this one's
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	return u.Serve(ctx)
}

// program is a row of processes that upgrade themselves.
type program struct {
	t       *testing.T
	addr    string
	pidFile string
	log     testlog.Buffer
}

func start(t *testing.T, protos string) *program {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &program{t: t, addr: ln.Addr().String(), pidFile: filepath.Join(t.TempDir(), "pid")}
	_ = ln.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", childEnv+"=1", addrEnv+"="+p.addr, pidFileEnv+"="+p.pidFile, protoEnv+"="+protos)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(&p.log, r)
	}()
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait()
		select {
		case <-copied:
		case <-time.After(patience):
			t.Error("a process does not end")
		}
		_ = r.Close()
		if log := p.log.String(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") || t.Failed() {
			t.Error(log)
		}
	})
	p.await("the first process", func() bool { return p.pid() != 0 })
	return p
}

func (p *program) pid() int {
	b, err := os.ReadFile(p.pidFile)
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(string(b))
	return n
}

func (p *program) await(what string, ok func() bool) {
	p.t.Helper()
	limit := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(limit) {
			p.t.Fatalf("waited for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// upgrade waits until another process is in charge; the old one may still have sessions.
func (p *program) upgrade() (oldPID, newPID int) {
	p.t.Helper()
	oldPID = p.pid()
	if err := syscall.Kill(oldPID, syscall.SIGHUP); err != nil {
		p.t.Fatal(err)
	}
	p.await("another process", func() bool { newPID = p.pid(); return newPID != oldPID })
	return oldPID, newPID
}

func (p *program) ended(pid int) {
	p.t.Helper()
	p.await("the end of the old process", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
}

// client is one connection.
type client struct {
	t *testing.T
	*tls.Conn
	r *bufio.Reader
}

func (p *program) dial() *client {
	p.t.Helper()
	c, err := tls.Dial("tcp", p.addr, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost", NextProtos: []string{"http/1.1"}})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * patience))
	return &client{p.t, c, bufio.NewReader(c)}
}

func (c *client) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		c.t.Fatal(err)
	}
}

// answer reads one response.
func (c *client) answer() string {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.t.Fatal("no response: ", err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		c.t.Fatalf("status %d: %s", resp.StatusCode, b)
	}
	return string(b)
}

// who asks which process answers.
func (c *client) who() int {
	c.t.Helper()
	c.send("GET /pid HTTP/1.1\r\nHost: x\r\n\r\n")
	return c.whoAnswers()
}

func (c *client) whoAnswers() int {
	c.t.Helper()
	var pid, version int
	var name string
	got := c.answer()
	if _, err := fmt.Sscanf(got, "%d %x %s", &pid, &version, &name); err != nil || version != tls.VersionTLS13 || name != "localhost" {
		c.t.Fatalf("answer %q (%v): want pid, TLS version and server name", got, err)
	}
	return pid
}
