// Peers puts the same clients on ktlsvisor, tableflip, nginx and HAProxy, has each of them
// reload itself, and prints as a Markdown table what became of the clients' sessions.
//
//	make peers
//
// nginx and HAProxy are Debian's: their packages are unpacked into a folder of their own,
// nothing is installed. Both terminate TLS in front of a plain echo server; tableflip is a
// crypto/tls echo server that replaces itself, as its documentation shows. Each has two
// rows where it has two ways: old processes may live as long as their sessions do, or only
// for a while.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/load"
)

func main() {
	if os.Getenv(roleEnv) != "" {
		if err := tableflipServer(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "peers: tableflip:", err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "`folder` with ktlsvisor and echo")
	flag.StringVar(&o.out, "o", "", "`file` for the table; it is printed in any case")
	flag.IntVar(&o.sessions, "sessions", 200, "clients; each sends ten times a second and checks every byte")
	flag.DurationVar(&o.limit, "limit", 2*time.Second, "how long old processes may live in the rows that say so")
	flag.DurationVar(&o.watch, "watch", 6*time.Second, "how long to watch after the reload")
	flag.Parse()
	if flag.NArg() > 0 || o.sessions < 1 {
		flag.Usage()
		os.Exit(2)
	}
	if err := o.run(); err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

type options struct {
	bin, out     string
	sessions     int
	limit, watch time.Duration
}

// server is one of those that are compared.
type server struct {
	name   string
	start  func(dir string) error
	addr   func() string
	old    func() []int // processes that serve sessions now
	reload func() error
	stop   func()
}

// row is what became of one server's sessions.
type row struct {
	name              string
	alive, lost, kept int // kept: alive in a process from before the reload
	stall             time.Duration
	wrong             uint64
	before            time.Duration // longest stall when nothing happened
}

func (o options) run() error {
	dir, err := os.MkdirTemp("", "kvp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	cred, err := writeCertificate(dir)
	if err != nil {
		return err
	}
	root, err := unpack(filepath.Join(dir, "debs"))
	if err != nil {
		return err
	}
	backend, err := startBackend()
	if err != nil {
		return err
	}
	defer backend.close()
	var rows []row
	for _, s := range []*server{
		o.ktlsvisor(), tableflipPeer(0, cred), tableflipPeer(o.limit, cred),
		nginxPeer(root, 0, cred, backend.addr), nginxPeer(root, o.limit, cred, backend.addr),
		haproxyPeer(root, 0, cred, backend.addr), haproxyPeer(root, o.limit, cred, backend.addr),
	} {
		fmt.Fprintf(os.Stderr, "%s\n", s.name)
		r, err := o.measure(s, filepath.Join(dir, fmt.Sprint(len(rows))))
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		rows = append(rows, r)
	}
	text := o.text(rows, versions(root))
	fmt.Print(text)
	if o.out == "" {
		return nil
	}
	return os.WriteFile(o.out, []byte(text), 0o644)
}

func (o options) measure(s *server, dir string) (r row, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return r, err
	}
	defer s.stop()
	if err := s.start(dir); err != nil {
		return r, err
	}
	if err := answers(s.addr()); err != nil {
		return r, err
	}
	fleet, err := load.Start(context.Background(), load.Options{Addr: s.addr(), Sessions: o.sessions, StallLimit: 4 * time.Second,
		TLS: &tls.Config{InsecureSkipVerify: true}}) // the certificate was made for this run
	if err != nil {
		return r, err
	}
	fleet.Phase("quiet", false)
	time.Sleep(o.watch / 3) // times of observation; nothing is decided by them
	old := s.old()
	fleet.Phase("reload", false)
	rerr := s.reload()
	time.Sleep(o.watch)
	alive := fleet.Snapshot().Alive
	kept := 0
	if anyAlive(old) {
		kept = alive
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	rep := fleet.Stop(ctx)
	if rerr != nil {
		return r, rerr
	}
	if len(old) == 0 {
		return r, errors.New("no process of it was found")
	}
	r = row{name: s.name, alive: alive, lost: o.sessions - alive, kept: kept, wrong: uint64(rep.WrongBytes)}
	for _, p := range rep.Phases {
		switch p.Name {
		case "quiet":
			r.before = p.LongestStall
		case "reload":
			r.stall = p.LongestStall
		}
	}
	return r, nil
}

func anyAlive(pids []int) bool {
	for _, pid := range pids {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(b), ") Z ") {
			return true
		}
	}
	return false
}

func (o options) text(rows []row, versions string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Peers

Written by `+"`make peers`"+`: the same %d clients, each with ten requests a second whose
answers are checked byte by byte, on each server while it replaces its processes once.
Looked at %s after the reload. *Lost* sessions were cut off, their clients have to connect
again. Sessions *with an old process* live, but with the old program and the old
configuration, and that process cannot go before the last of them does. The stall is the
longest time that any client waited for an answer that came; in brackets when nothing
happened. Clients and servers share the machine.

%s. Go %s, %d CPUs, %s.

| server | alive | lost | with an old process | longest stall | wrong bytes |
|---|---:|---:|---:|---:|---:|
`, o.sessions, o.watch, versions, strings.TrimPrefix(runtime.Version(), "go"), runtime.NumCPU(), time.Now().UTC().Format(time.DateOnly))
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d ms (%d ms) | %d |\n", r.name, r.alive, r.lost, r.kept, r.stall.Milliseconds(), r.before.Milliseconds(), r.wrong)
	}
	return b.String()
}

// answers waits until a TLS handshake succeeds.
func answers(addr string) error {
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		var c *tls.Conn
		if c, err = tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true}); err == nil {
			return c.Close()
		}
	}
	return fmt.Errorf("it does not answer: %w", err)
}
