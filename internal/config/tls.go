package config

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// validateTLS checks the [tls] table.
func (c *Config) validateTLS(p *problems) {
	if c.TLS.MinVersion != "" {
		choice(p, "tls.min_version", c.TLS.MinVersion, "1.2", "1.3")
	}
	if c.TLS.Cert == "" && c.TLS.Key == "" {
		return
	}
	if c.SelfSigned {
		p.add("self_signed", "leave out one of the two", "there is a certificate in %s as well, so it is not clear which one is meant", c.src.place("tls"))
	}
	keyPair(p, "tls", c.TLS.Cert, c.TLS.Key)
}

func (c *Config) validateListeners(p *problems) {
	if len(c.Listeners) == 0 && !c.src.written("listener") {
		remedy := `add a [[listener]] with its address = "host:port"`
		if c.src.isFlags() {
			remedy = "add --listen host:port"
		}
		p.add("listener", remedy, "there is none, so nobody could connect")
	}
	seen := make([]address, len(c.Listeners))
	for i := range c.Listeners {
		l, key := &c.Listeners[i], fmt.Sprintf("listener[%d]", i)
		c.validateAddress(p, l, key, seen, i)
		c.validateListenerPool(p, l, key)
		c.validateListenerTLS(p, l, key)
	}
}

// validateAddress checks the address of listener i against those before it, and puts
// it into seen.
func (c *Config) validateAddress(p *problems, l *Listener, key string, seen []address, i int) {
	key += ".address"
	if l.Address == "" {
		p.add(key, `give "host:port", or ":port" for every address of the machine`, "missing")
		return
	}
	a, err := parseAddress(l.Address)
	if err != nil {
		p.add(key, `give "host:port", or ":port" for every address of the machine`, "%q: %s", l.Address, err)
		return
	}
	seen[i] = a
	for j, other := range seen[:i] {
		if !a.conflicts(other) {
			continue
		}
		where := c.src.place(fmt.Sprintf("listener[%d].address", j))
		switch what := ""; {
		case a == other:
			if c.Listeners[j].Address != l.Address {
				what = fmt.Sprintf(" as %q", c.Listeners[j].Address)
			}
			p.add(key, "give each listener its own address", "%q is already used by %s%s", l.Address, where, what)
		default:
			p.add(key, "give each listener its own address, or keep only the one for every address",
				"%q overlaps with %q of %s", l.Address, c.Listeners[j].Address, where)
		}
		return
	}
}

func (c *Config) validateListenerPool(p *problems, l *Listener, key string) {
	if len(c.Pools) == 0 || c.Pool(l.Pool) != nil && l.Pool != "" {
		return // no pool at all has been reported already
	}
	names := make([]string, 0, len(c.Pools))
	for _, pool := range c.Pools {
		if validPoolName(pool.Name) && !slices.Contains(names, pool.Name) {
			names = append(names, pool.Name)
		}
	}
	if l.Pool == "" {
		p.add(key+".pool", "name one of "+strings.Join(names, ", "), "missing, and there is more than one pool")
		return
	}
	remedy := "the pools are " + strings.Join(names, ", ")
	if near := nearest(l.Pool, names); near != "" {
		remedy = fmt.Sprintf("did you mean %q?", near)
	}
	p.add(key+".pool", remedy, "there is no pool %q", l.Pool)
}

func (c *Config) validateListenerTLS(p *problems, l *Listener, key string) {
	if l.MinVersion != c.TLS.MinVersion { // otherwise it was checked there
		choice(p, key+".min_version", l.MinVersion, "1.2", "1.3")
	}
	switch {
	case l.Cert == "" && l.Key == "":
		if !c.SelfSigned {
			remedy := "set cert and key, here or in [tls]; or self_signed = true to try things out"
			if c.src.isFlags() {
				remedy = "add --cert FILE --key FILE, or --self-signed to try things out"
			}
			p.add(key+".cert", remedy, "there is no certificate for this listener")
		}
	case l.Cert == c.TLS.Cert && l.Key == c.TLS.Key: // checked there
	default:
		keyPair(p, key, l.Cert, l.Key)
	}
	for i, proto := range l.ALPN {
		elem := fmt.Sprintf("%s.alpn[%d]", key, i)
		switch {
		case proto == "" || len(proto) > 255: // RFC 7301, section 3.1
			p.add(elem, "a protocol's name has 1 to 255 bytes", "%d bytes are not possible", len(proto))
		case slices.Contains(l.ALPN[:i], proto):
			p.add(elem, "name it once", "%q is there twice", proto)
		}
	}
	if l.ClientCA != "" {
		if _, err := certPool(l.ClientCA); err != nil {
			p.add(key+".client_ca", "name a PEM file with the certificates that may sign those of clients", "%s: %s", l.ClientCA, reason(err))
		}
	}
}

// keyPair checks that a certificate and its key are there and belong together.
func keyPair(p *problems, table, cert, key string) {
	if cert == "" || key == "" {
		have, lacks := "cert", "key"
		if cert == "" {
			have, lacks = lacks, have
		}
		p.add(table+"."+have, "give both, as PEM files", "there is no %s to go with it", lacks)
		return
	}
	readable := true
	for name, path := range map[string]string{"cert": cert, "key": key} {
		if _, err := os.ReadFile(path); err != nil {
			readable = false
			remedy := "correct the path"
			switch {
			case errors.Is(err, fs.ErrNotExist):
				remedy = "create the file or correct the path; self_signed = true needs none"
			case errors.Is(err, fs.ErrPermission):
				remedy = "make it readable for the user that runs ktlsvisor"
			}
			p.add(table+"."+name, remedy, "%s: %s", path, reason(err))
		}
	}
	if !readable {
		return
	}
	_, err := tls.LoadX509KeyPair(cert, key)
	if err == nil {
		return
	}
	what := strings.TrimPrefix(err.Error(), "tls: ")
	if strings.Contains(what, "does not match") {
		p.add(table+".key", "give the key that the certificate was made for", "%s is not the key of %s", key, cert)
		return
	}
	p.add(table+".cert", "give a PEM certificate with its chain and an unencrypted PEM key", "%s and %s cannot be used: %s", cert, key, what)
}

func certPool(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("no certificate in it")
	}
	return pool, nil
}

// TLSConfig returns what crypto/tls needs for this listener, read from its files
// anew. Certificates is empty for a self-signed listener: the caller adds its own.
func (l *Listener) TLSConfig() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: slices.Clone(l.ALPN)}
	if l.MinVersion == "1.3" {
		cfg.MinVersion = tls.VersionTLS13
	}
	if l.Cert != "" {
		cert, err := tls.LoadX509KeyPair(l.Cert, l.Key)
		if err != nil {
			return nil, fmt.Errorf("certificate of listener %s: %w", l.Address, err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	if l.ClientCA != "" {
		pool, err := certPool(l.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("client_ca of listener %s: %s: %w", l.Address, l.ClientCA, err)
		}
		cfg.ClientCAs, cfg.ClientAuth = pool, tls.RequireAndVerifyClientCert
	}
	return cfg, nil
}
