package supervise

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

const adminName = "admin"

// openListeners takes the listening sockets from the keeper, or opens them and
// gives them to it. Their queues of waiting connections are shared by all
// supervisors, so none is lost between two of them.
func (s *Supervisor) openListeners(ctx context.Context, blobs map[string]blob) error {
	entries, err := s.keeper.Get(ctx, keeper.KindListener)
	if err != nil {
		return err
	}
	have := map[string]int{}
	defer func() {
		for _, fd := range have {
			sys.CloseAll([]int{fd})
		}
	}()
	for i := range entries {
		if len(entries[i].FDs) == 1 {
			have[entries[i].Key.Name] = entries[i].FDs[0]
		} else {
			sys.CloseAll(entries[i].FDs)
		}
	}
	ticket, err := s.ticketKey(ctx, blobs)
	if err != nil {
		return err
	}
	for i := range s.cfg.Listeners {
		c := &s.cfg.Listeners[i]
		cfg, err := s.listenerConfig(ctx, i, c, blobs, ticket)
		if err != nil {
			return err
		}
		ln, err := openListener(ctx, s.keeper, have, "tcp:"+c.Address, func() (net.Listener, error) { return listen(c.Address) })
		if err != nil {
			return fmt.Errorf("listener %s: %w", c.Address, err)
		}
		tl, ok := ln.(*net.TCPListener)
		if !ok {
			return fmt.Errorf("listener %s: not a TCP socket", c.Address)
		}
		s.front.listeners = append(s.front.listeners, &listener{ln: tl, pool: c.Pool, cfg: cfg})
	}
	ln, err := openListener(ctx, s.keeper, have, adminName, func() (net.Listener, error) { return admin.Listen(admin.Path(s.cfg.Admin)) })
	if err != nil {
		return err
	}
	if ul, ok := ln.(*net.UnixListener); ok {
		ul.SetUnlinkOnClose(false)
	}
	s.adminListener = ln
	return nil
}

func openListener(ctx context.Context, k store, have map[string]int, name string, open func() (net.Listener, error)) (net.Listener, error) {
	if fd, ok := have[name]; ok {
		delete(have, name)
		f := os.NewFile(uintptr(fd), name)
		defer func() { _ = f.Close() }()
		return net.FileListener(f)
	}
	ln, err := open()
	if err != nil {
		return nil, err
	}
	f, err := ln.(interface{ File() (*os.File, error) }).File()
	if err == nil {
		var fd int
		fd, err = dupFile(f)
		_ = f.Close()
		if err == nil {
			err = k.Put(ctx, keeper.Entry{Key: keeper.Key{Kind: keeper.KindListener, Name: name}, FDs: []int{fd}})
			sys.CloseAll([]int{fd})
		}
	}
	if err != nil {
		_ = ln.Close()
		return nil, err
	}
	return ln, nil
}

func (s *Supervisor) listenerConfig(ctx context.Context, i int, c *config.Listener, blobs map[string]blob, ticket [32]byte) (*ktls.Config, error) {
	name := fmt.Sprintf("certificate:%d", i)
	stored := blobs[name].data
	tc, err := c.TLSConfig()
	switch {
	case err != nil && stored != nil:
		// The files were good when the unit started; a restart must not depend on them.
		s.log.Error("certificate cannot be loaded; the last good one stays in use", "listener", c.Address, "error", err)
		last := *c
		last.Cert, last.Key = "", ""
		if tc, err = last.TLSConfig(); err != nil {
			return nil, fmt.Errorf("listener %s: %w", c.Address, err)
		}
		tc.Certificates = nil
	case err != nil:
		return nil, fmt.Errorf("listener %s: %w", c.Address, err)
	}
	if len(tc.Certificates) == 0 {
		if stored == nil {
			if stored, err = selfSigned(); err != nil {
				return nil, fmt.Errorf("listener %s: certificate: %w", c.Address, err)
			}
		}
		cert, err := tls.X509KeyPair(stored, stored)
		if err != nil {
			return nil, fmt.Errorf("listener %s: stored certificate: %w", c.Address, err)
		}
		tc.Certificates = []tls.Certificate{cert}
	} else {
		crt, err1 := os.ReadFile(c.Cert)
		key, err2 := os.ReadFile(c.Key)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("listener %s: %w", c.Address, err)
		}
		stored = append(append(crt, '\n'), key...)
	}
	if err := putBlob(ctx, s.keeper, name, stored); err != nil {
		return nil, err
	}
	tc.SetSessionTicketKeys([][32]byte{ticket})
	mode, rekey := ktls.ModeAuto, false
	if p := s.cfg.Pool(c.Pool); p != nil {
		if mode, err = ktls.ParseMode(p.Offload); err != nil {
			return nil, err
		}
		rekey = p.Rekey == config.RekeyRequire
	}
	return &ktls.Config{TLS: tc, Mode: mode, RequireRekey: rekey, HandshakeTimeout: time.Duration(s.cfg.HandshakeTimeout)}, nil
}

// putBlob stores data in a sealed memory file: it may be secret, and the keeper
// holds it without mapping it.
func putBlob(ctx context.Context, k store, name string, data []byte) error {
	fd, err := sys.SealedMemfd("ktlsvisor-blob", data)
	if err != nil {
		return err
	}
	defer sys.CloseAll([]int{fd})
	return k.Put(ctx, keeper.Entry{Key: keeper.Key{Kind: keeper.KindBlob, Name: name}, FDs: []int{fd}})
}

// ticketKey returns the key of session tickets: the same for all supervisors of
// the unit, so that clients resume across their restarts.
func (s *Supervisor) ticketKey(ctx context.Context, blobs map[string]blob) (key [32]byte, err error) {
	const name = "ticket-key"
	if b := blobs[name].data; len(b) == len(key) {
		copy(key[:], b)
		return key, nil
	}
	if _, err := rand.Read(key[:]); err != nil {
		return key, err
	}
	return key, putBlob(ctx, s.keeper, name, key[:])
}

// selfSigned makes a certificate for trying things out, as PEM with its key.
func selfSigned() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	tmpl := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "ktlsvisor self-signed"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0), DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true, IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	kder, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return append(out, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})...), nil
}
