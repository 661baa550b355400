package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

// packages are Debian's; what they depend on besides is part of any Debian.
var packages = []string{"nginx", "nginx-common", "libnginx-mod-stream", "haproxy", "liblua5.3-0", "libopentracing1", "libopentracing-c-wrapper0"}

// unpack downloads the packages and unpacks them into a folder, which it returns.
func unpack(dir string) (string, error) {
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o777); err != nil { // apt-get may drop its privileges
		return "", err
	}
	get := exec.Command("apt-get", append([]string{"download", "-qq"}, packages...)...)
	get.Dir = dir
	if out, err := get.CombinedOutput(); err != nil {
		return "", fmt.Errorf("apt-get download (Debian or a relative of it is needed; apt-get update first): %w\n%s", err, out)
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return "", err
	}
	for _, d := range debs {
		if out, err := exec.Command("dpkg", "-x", d, root).CombinedOutput(); err != nil {
			return "", fmt.Errorf("dpkg -x: %w\n%s", err, out)
		}
	}
	return root, nil
}

// versions are those of the packages.
func versions(root string) string {
	debs, _ := filepath.Glob(filepath.Join(filepath.Dir(root), "*.deb"))
	var list []string
	for _, d := range debs {
		f := strings.Split(filepath.Base(d), "_")
		if len(f) == 3 && (f[0] == "nginx" || f[0] == "haproxy") {
			list = append(list, f[0]+" "+f[1])
		}
	}
	return "Debian's " + strings.Join(list, " and ")
}

// credentials are files in PEM; both is certificate and key in one.
type credentials struct{ cert, key, both string }

func writeCertificate(dir string) (c credentials, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return c, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "peers.test"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return c, err
	}
	kder, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return c, err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})
	c = credentials{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "both.pem")}
	return c, errors.Join(os.WriteFile(c.cert, cert, 0o644), os.WriteFile(c.key, private, 0o600), os.WriteFile(c.both, append(cert, private...), 0o600))
}

// backend is the plain echo server behind nginx and HAProxy.
type backend struct {
	ln   net.Listener
	addr string
}

func startBackend() (*backend, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go echo(c)
		}
	}()
	return &backend{ln, ln.Addr().String()}, nil
}

func (b *backend) close() { _ = b.ln.Close() }

func echo(c net.Conn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}

const roleEnv = "PEERS_ROLE"

// tableflipServer is an echo server as tableflip's documentation has it: address,
// certificate, key, and how long the old process waits for its connections (0: until the
// last has ended).
func tableflipServer(args []string) error {
	limit, err := time.ParseDuration(args[3])
	if err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(args[1], args[2])
	if err != nil {
		return err
	}
	upg, err := tableflip.New(tableflip.Options{})
	if err != nil {
		return err
	}
	defer upg.Stop()
	go func() {
		sig := make(chan os.Signal, 1)
		signal.Notify(sig, syscall.SIGHUP)
		for range sig {
			if err := upg.Upgrade(); err != nil {
				fmt.Fprintln(os.Stderr, "upgrade:", err)
			}
		}
	}()
	ln, err := upg.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	var conns sync.WaitGroup
	go func() {
		tln := tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{cert}})
		for {
			c, err := tln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { echo(c) })
		}
	}()
	if err := upg.Ready(); err != nil {
		return err
	}
	<-upg.Exit()
	_ = ln.Close()
	done := make(chan struct{})
	go func() {
		conns.Wait()
		close(done)
	}()
	if limit == 0 {
		<-done
		return nil
	}
	select {
	case <-done:
	case <-time.After(limit):
	}
	return nil
}
