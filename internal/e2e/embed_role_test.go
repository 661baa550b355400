package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/ktls"
	"github.com/ktlsvisor/ktlsvisor/state"
)

func init() { roles["embed"] = playEmbedded }

// modeFile is beside a program and says how it is to misbehave, when it is started next.
const modeFile = ".mode"

// playEmbedded is an echo server that upgrades itself, and can go wrong.
func playEmbedded() int {
	if err := embedded(); err != nil {
		fmt.Fprintln(os.Stderr, "embedded:", err)
		return 1
	}
	return 0
}

func embedded() error {
	listen := flag.String("listen", "", "")
	pidFile := flag.String("pid-file", "", "")
	dieMoving := flag.Int64("die-moving", 0, "kill this process when so many of its sessions were asked to move")
	flag.Parse()
	b, err := os.ReadFile(os.Args[0] + modeFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	mode, arg, _ := strings.Cut(string(b), " ")
	dieServing, _ := strconv.ParseInt(arg, 10, 64)
	die := func() {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	schema := state.Info{Name: "embedded", Writes: 1, Restores: []uint32{1}}
	ready := func(context.Context) error { return nil }
	switch mode {
	case "exit":
		return errors.New("as told")
	case "hang":
		select {}
	case "no-upgrader":
		die()
	case "other-state":
		schema = state.Info{Name: "embedded", Writes: 2, Restores: []uint32{2}}
	case "unready":
		ready = func(context.Context) error { return errors.New("as told") }
	}
	var served, moved atomic.Int64
	first := !hasParent()
	echo := func(_ context.Context, c *handoff.Conn) error {
		if served.Add(1) == dieServing && mode == "die" {
			die()
		}
		_, err := io.Copy(c, c)
		if errors.Is(err, handoff.ErrMoving) && first && moved.Add(1) == *dieMoving {
			die()
		}
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, about, about, &key.PublicKey, key)
	if err != nil {
		return err
	}
	u, err := handoff.NewUpgrader(handoff.HandlerFunc(echo), handoff.WithPIDFile(*pidFile), handoff.WithUpgradeOn(syscall.SIGHUP),
		handoff.WithSchemas(schema), handoff.WithReady(ready), handoff.WithStartTime(2*time.Second))
	if err != nil {
		return err
	}
	if _, err := u.Listen("tcp", *listen, &ktls.Config{TLS: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}}); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return u.Serve(ctx)
}

// hasParent is asked before NewUpgrader takes the variable away.
func hasParent() bool {
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "TABLEFLIP_HAS_PARENT") {
			return true
		}
	}
	return false
}
