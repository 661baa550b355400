// Command selfupgrade is a complete TLS echo server that upgrades itself:
//
//	selfupgrade -listen 127.0.0.1:8443 -pid-file /run/selfupgrade.pid
//	kill -HUP $(cat /run/selfupgrade.pid)    # after putting another binary in its place
//
// Clients stay connected and lose no byte. Without -cert and -key it makes a certificate
// for itself, for trying it out.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"io"
	"log"
	"math/big"
	"os/signal"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// echo returns what io.Copy returns: handoff.ErrMoving when the session moves.
func echo(_ context.Context, c *handoff.Conn) error {
	_, err := io.Copy(c, c)
	return err
}

func main() {
	listen := flag.String("listen", "127.0.0.1:8443", "`address` to listen on")
	pidFile := flag.String("pid-file", "", "`file` for the pid of the process in charge")
	cert := flag.String("cert", "", "certificate `file` (PEM)")
	key := flag.String("key", "", "key `file` (PEM)")
	flag.Parse()
	if err := run(*listen, *pidFile, *cert, *key); err != nil {
		log.Fatal("selfupgrade: ", err)
	}
}

func run(listen, pidFile, certFile, keyFile string) error {
	cert, err := certificate(certFile, keyFile)
	if err != nil {
		return err
	}
	u, err := handoff.NewUpgrader(handoff.HandlerFunc(echo),
		handoff.WithPIDFile(pidFile), handoff.WithUpgradeOn(syscall.SIGHUP), handoff.WithDrainLimit(time.Minute))
	if err != nil {
		return err
	}
	conf := &ktls.Config{TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}
	if _, err := u.Listen("tcp", listen, conf); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return u.Serve(ctx)
}

func certificate(certFile, keyFile string) (tls.Certificate, error) {
	if certFile != "" {
		return tls.LoadX509KeyPair(certFile, keyFile)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().AddDate(1, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, about, about, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
