package bench

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Case is one thing to compare.
type Case struct {
	ID      string
	noAES   bool // needs a process without AES instructions
	measure func(s Scale) (Comparison, error)
	layer   string
}

// Scale is how much is done: an emulated machine is a hundred times slower.
type Scale struct {
	Turns      int
	Bulk       int // bytes a turn
	RoundTrips int
	Handshakes int
	File       int // bytes
}

// Full is for a machine as it is, Emulated for one without KVM, Tiny for tests of the
// measurements themselves.
var (
	Full     = Scale{Turns: 31, Bulk: 64 << 20, RoundTrips: 2000, Handshakes: 150, File: 64 << 20}
	Emulated = Scale{Turns: 11, Bulk: 2 << 20, RoundTrips: 100, Handshakes: 5, File: 4 << 20}
	Tiny     = Scale{Turns: 1, Bulk: 1 << 20, RoundTrips: 20, Handshakes: 2, File: 256 << 10}
)

// SoftwareCases are for this machine.
func SoftwareCases() []Case {
	var list []Case
	for _, p := range []struct {
		id string
		protocol
	}{{"tls13-aes128", aes128TLS13}, {"tls13-chacha", chachaTLS13}, {"tls12-aes128", aes128TLS12}, {"tls12-aes256", aes256TLS12}, {"tls12-chacha", chachaTLS12}} {
		noAES := p.protocol == chachaTLS13
		for _, kib := range []int{16, 64, 256} {
			list = append(list, Case{fmt.Sprintf("bulk%d-%s", kib, p.id), noAES, func(s Scale) (Comparison, error) {
				return bulk(ktls.ModeSoftware, p.protocol, kib<<10, s.Bulk, s.Turns)
			}, "software"})
		}
		list = append(list, Case{"pingpong-" + p.id, noAES, func(s Scale) (Comparison, error) {
			return pingPong(ktls.ModeSoftware, p.protocol, s.RoundTrips, s.Turns)
		}, "software"})
	}
	for _, p := range []struct {
		id string
		protocol
	}{{"handshake-tls13", aes128TLS13}, {"handshake-tls12", aes128TLS12}} {
		list = append(list, Case{p.id, false, func(s Scale) (Comparison, error) { return handshake(p.protocol, s.Handshakes, s.Turns) }, "software"})
	}
	return list
}

// KernelCases are for a kernel with TLS.
func KernelCases() []Case {
	return []Case{
		{"file-tls13-aes128", false, func(s Scale) (Comparison, error) {
			return download(ktls.ModeKernel, aes128TLS13, s.File, s.Turns)
		}, "kernel"},
		{"file-tls12-aes128", false, func(s Scale) (Comparison, error) {
			return download(ktls.ModeKernel, aes128TLS12, s.File, s.Turns)
		}, "kernel"},
		{"pingpong-tls13-aes128", false, func(s Scale) (Comparison, error) {
			return pingPong(ktls.ModeKernel, aes128TLS13, s.RoundTrips, s.Turns)
		}, "kernel"},
	}
}

// Measure makes the comparison.
func (c Case) Measure(s Scale) (r Comparison, err error) {
	if c.noAES {
		r, err = c.inChild(s)
	} else {
		r, err = c.measure(s)
	}
	if err != nil {
		return r, fmt.Errorf("%s: %w", c.ID, err)
	}
	r.ID, r.Layer, r.Run = c.ID, c.layer, thisRun()
	return r, nil
}

type caseOrder struct {
	ID    string
	Scale Scale
}

func (c Case) inChild(s Scale) (r Comparison, err error) {
	child, err := startRole("case")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, child.stop()) }()
	order, err := json.Marshal(caseOrder{c.ID, s})
	if err != nil {
		return r, err
	}
	line, err := child.order("%s", order)
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal([]byte(line), &r)
}

// runCase measures one of SoftwareCases in this process.
func runCase(_ []string, in *bufio.Scanner, out io.Writer) error {
	for in.Scan() {
		var o caseOrder
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			return err
		}
		for _, c := range SoftwareCases() {
			if c.ID != o.ID {
				continue
			}
			r, err := c.measure(o.Scale)
			if err != nil {
				fmt.Fprintln(out, "error", err)
				continue
			}
			if err := json.NewEncoder(out).Encode(r); err != nil {
				return err
			}
		}
	}
	return in.Err()
}
