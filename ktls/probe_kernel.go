package ktls

import (
	"bytes"
	"crypto/fips140"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// kernelEdge is what a probe does to the kernel, so that kernels that are not at
// hand can be played in tests.
type kernelEdge struct {
	release    string
	pair       func() (a, b *net.TCPConn, err error)
	attach     func(c *net.TCPConn) error
	setKeys    func(c *net.TCPConn, dir sys.TLSDirection, info []byte) error
	hasKeys    func(c *net.TCPConn, dir sys.TLSDirection) (version, cipher uint16, err error)
	carries    func(from, to *net.TCPConn) error
	sendsFile  func(from, to *net.TCPConn) error
	splices    func(from, to *net.TCPConn) error
	moduleFile func(release string) moduleFile
	softwareOK bool
}

func realKernel() kernelEdge {
	return kernelEdge{
		release:    sys.KernelRelease(),
		pair:       loopbackPair,
		attach:     func(c *net.TCPConn) error { return onFD(c, sys.AttachTLS) },
		setKeys:    setKeysOn,
		hasKeys:    hasKeysOn,
		carries:    carriesRecord,
		sendsFile:  sendsFile,
		splices:    splices,
		moduleFile: findModule,
		softwareOK: !fips140.Enforced(),
	}
}

// throwawayKeys are random keys for a connection of the probe.
func throwawayKeys(version uint16, cipher kernelCipher) *cryptoInfo {
	key, iv := make([]byte, cipher.key), make([]byte, 12)
	_, _ = rand.Read(key) // never fails (Go 1.24)
	_, _ = rand.Read(iv)
	if version == tls.VersionTLS12 && cipher.salt > 0 {
		iv = iv[:cipher.salt]
	}
	ci := new(cryptoInfo)
	if err := ci.pack(version, aSuite(version, cipher), key, iv, 0); err != nil {
		// An empty crypto_info is refused with EINVAL, so the check says so.
		ci.wipe()
		ci.n = 0
	}
	return ci
}

// readyPair is a connection of this process to itself with the ULP at both ends.
func (k kernelEdge) readyPair() (a, b *net.TCPConn, err error) {
	a, b, err = k.pair()
	if err != nil {
		return nil, nil, fmt.Errorf("no connection to try it on: %w", err)
	}
	for _, c := range []*net.TCPConn{a, b} {
		if err := k.attach(c); err != nil {
			closeBoth(a, b)
			return nil, nil, err
		}
	}
	return a, b, nil
}

func closeBoth(a, b *net.TCPConn) {
	for _, c := range []*net.TCPConn{a, b} {
		if c != nil {
			_ = c.Close()
		}
	}
}

// probeTimeout bounds each wait of the probe, which never leaves the loopback
// interface.
const probeTimeout = 2 * time.Second

// loopbackPair connects this process to itself.
func loopbackPair() (a, b *net.TCPConn, err error) {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		var err6 error
		if l, err6 = net.ListenTCP("tcp6", &net.TCPAddr{IP: net.IPv6loopback}); err6 != nil {
			return nil, nil, err
		}
	}
	defer func() { _ = l.Close() }()
	d := net.Dialer{Timeout: probeTimeout}
	d.SetMultipathTCP(false)
	conn, err := d.Dial(l.Addr().Network(), l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	a, _ = conn.(*net.TCPConn)
	deadline := time.Now().Add(probeTimeout)
	_ = l.SetDeadline(deadline)
	for {
		b, err = l.AcceptTCP()
		if err != nil {
			_ = a.Close()
			return nil, nil, err
		}
		// Any process of this host can connect to the port.
		if b.RemoteAddr().String() == a.LocalAddr().String() {
			break
		}
		_ = b.Close()
	}
	_ = a.SetDeadline(deadline)
	_ = b.SetDeadline(deadline)
	return a, b, nil
}

// onFD runs f on the connection's descriptor.
func onFD(c *net.TCPConn, f func(fd int) error) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { err = f(int(fd)) })
	if cerr != nil {
		return cerr
	}
	return err
}

func setKeysOn(c *net.TCPConn, dir sys.TLSDirection, info []byte) error {
	return onFD(c, func(fd int) error { return sys.SetTLSKeys(fd, dir, info) })
}

func hasKeysOn(c *net.TCPConn, dir sys.TLSDirection) (version, cipher uint16, err error) {
	err = onFD(c, func(fd int) error {
		version, cipher, err = kernelVersion(fd, dir)
		return err
	})
	return version, cipher, err
}

// carriesRecord sends one record and compares what arrives.
func carriesRecord(from, to *net.TCPConn) error {
	sent := []byte("a record of the probe")
	if err := onFD(from, func(fd int) error {
		n, err := sys.TLSSendData(fd, sent)
		if err == nil && n != len(sent) {
			err = fmt.Errorf("%d of %d bytes taken", n, len(sent))
		}
		return err
	}); err != nil {
		return err
	}
	got := make([]byte, 2*len(sent))
	var n, typ int
	rc, err := to.SyscallConn()
	if err != nil {
		return err
	}
	rerr := rc.Read(func(fd uintptr) bool {
		n, typ, _, err = sys.TLSRecv(int(fd), got)
		return !errors.Is(err, sys.EAGAIN)
	})
	switch {
	case rerr != nil:
		return rerr
	case err != nil:
		return err
	case typ != int(typeData) || !bytes.Equal(got[:n], sent):
		return fmt.Errorf("%d bytes of type %d arrived, %d of type %d were sent", n, typ, len(sent), typeData)
	}
	return nil
}

// moduleFile says whether the tls module's file is where it belongs.
type moduleFile uint8

const (
	moduleUnclear moduleFile = iota // no module directory of this kernel here, as in most containers
	moduleThere
	moduleNone
)

func findModule(release string) moduleFile {
	dir := filepath.Join("/lib/modules", release)
	if _, err := os.Stat(filepath.Join(dir, "kernel")); err != nil {
		return moduleUnclear
	}
	found, err := filepath.Glob(filepath.Join(dir, "kernel/net/tls/tls.ko*"))
	switch {
	case err != nil:
		return moduleUnclear
	case len(found) > 0:
		return moduleThere
	}
	return moduleNone
}
