package bench

import (
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

const recordSize = 16 << 10 // plaintext of a full record

// bulk sends one way in writes of size bytes, read in pieces of up to 64 KiB. One turn
// is about total bytes.
func bulk(mode ktls.Mode, proto protocol, size, total, turns int) (Comparison, error) {
	writes := max(1, total/size)
	bytes := float64(writes * size)
	records := writes * ((size + recordSize - 1) / recordSize)
	c, err := onPairs(mode, proto, turns, effort{rate: bytes / 1e6, cpu: bytes, records: records}, func(p *pair) error {
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
	c.Name = fmt.Sprintf("bulk, %s, writes of %d KiB", proto, size>>10)
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

// pingPong sends 256 bytes there and back, n times a turn.
func pingPong(mode ktls.Mode, proto protocol, n, turns int) (Comparison, error) {
	const size = 256
	c, err := onPairs(mode, proto, turns, effort{rate: float64(n), cpu: float64(n), records: 2 * n}, func(p *pair) error {
		echoed := make(chan error, 1)
		go func() { echoed <- echo(p.server, make([]byte, size), n) }()
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
	c.Name = fmt.Sprintf("ping-pong, %s, %d bytes", proto, size)
	c.Unit, c.CPUFor = "round trips/s", "round trip"
	return c, err
}

func echo(c net.Conn, b []byte, n int) error {
	for range n {
		if _, err := io.ReadFull(c, b); err != nil {
			return err
		}
		if _, err := c.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// onPairs compares over one session of each library that lasts for all turns. CPU time
// and allocations are those of both ends.
func onPairs(mode ktls.Mode, proto protocol, turns int, e effort, f func(*pair) error) (Comparison, error) {
	creds, err := newCredentials()
	if err != nil {
		return Comparison{}, err
	}
	work := map[library]func() (turn, error){}
	for _, lib := range libraries {
		p, err := newPair(lib, mode, proto, creds)
		if err != nil {
			return Comparison{}, err
		}
		defer p.close()
		work[lib] = func() (turn, error) { return timed(func() error { return f(p) }) }
	}
	c, err := compare(turns, e, work)
	c.CPUOf = "both ends"
	return c, err
}
