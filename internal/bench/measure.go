package bench

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
)

// Bulk sends one way in writes of size bytes, read in pieces of up to 64 KiB.
// One turn is about total bytes.
func Bulk(version uint16, size, total, turns int) (Comparison, error) {
	writes := max(1, total/size)
	name := fmt.Sprintf("bulk, %s, writes of %d KiB", tls.VersionName(version), size>>10)
	bytes := float64(writes * size)
	c, err := onPairs(name, version, turns, bytes/1e6, bytes, func(p *pair) error {
		received := make(chan error, 1)
		go func() { received <- drain(p.client, writes*size) }()
		b := make([]byte, size)
		for range writes {
			if _, err := p.server.Write(b); err != nil {
				p.close() // ends drain
				return errors.Join(err, <-received)
			}
		}
		return <-received
	})
	c.Unit, c.CPUFor = "MB/s", "byte"
	return c, err
}

func drain(c net.Conn, total int) error {
	b := make([]byte, 64<<10)
	for total > 0 {
		n, err := c.Read(b[:min(len(b), total)])
		if err != nil {
			return err
		}
		total -= n
	}
	return nil
}

// PingPong sends 256 bytes there and back, n times a turn.
func PingPong(version uint16, n, turns int) (Comparison, error) {
	const size = 256
	name := fmt.Sprintf("ping-pong, %s, %d bytes", tls.VersionName(version), size)
	c, err := onPairs(name, version, turns, float64(n), float64(n), func(p *pair) error {
		echoed := make(chan error, 1)
		go func() {
			b := make([]byte, size)
			for range n {
				if _, err := io.ReadFull(p.server, b); err != nil {
					echoed <- err
					return
				}
				if _, err := p.server.Write(b); err != nil {
					echoed <- err
					return
				}
			}
			echoed <- nil
		}()
		b := make([]byte, size)
		for range n {
			_, err := p.client.Write(b)
			if err == nil {
				_, err = io.ReadFull(p.client, b)
			}
			if err != nil {
				p.close()
				return errors.Join(err, <-echoed)
			}
		}
		return <-echoed
	})
	c.Unit, c.CPUFor = "round trips/s", "round trip"
	return c, err
}

// onPairs compares over one session of each library that lasts for all turns.
func onPairs(name string, version uint16, turns int, amount, cpuUnits float64, f func(*pair) error) (Comparison, error) {
	creds, err := newCredentials()
	if err != nil {
		return Comparison{}, err
	}
	work := map[library]func() error{}
	for _, lib := range libraries {
		p, err := newPair(lib, version, creds)
		if err != nil {
			return Comparison{}, err
		}
		defer p.close()
		work[lib] = func() error { return f(p) }
	}
	return compare(name, turns, amount, cpuUnits, work)
}
