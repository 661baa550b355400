package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// address is a listener's address in a form that can be compared.
type address struct {
	host string // "" for every address of the machine
	port int
}

// parseAddress reads "host:port" as net.Listen does for "tcp", without asking DNS.
func parseAddress(s string) (address, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		var ae *net.AddrError
		if errors.As(err, &ae) {
			return address{}, errors.New(ae.Err)
		}
		return address{}, err
	}
	if port == "" {
		return address{}, errors.New("missing port in address")
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		if n, err = net.LookupPort("tcp", port); err != nil {
			return address{}, fmt.Errorf("unknown port %q", port)
		}
	}
	if n < 0 || n > 65535 {
		return address{}, fmt.Errorf("port %d is not between 0 and 65535", n)
	}
	if strings.ContainsAny(host, " \t/") {
		return address{}, fmt.Errorf("%q is no host", host)
	}
	a := address{host: strings.TrimSuffix(strings.ToLower(host), "."), port: n}
	if a.host == "localhost" {
		a.host = "127.0.0.1" // net.Listen takes the IPv4 address of a name first
	}
	if ip, err := netip.ParseAddr(a.host); err == nil {
		ip = ip.Unmap()
		a.host = ip.String()
		// Go listens on both families for 0.0.0.0 as well as for [::].
		if ip.IsUnspecified() {
			a.host = ""
		}
	}
	return a, nil
}

// conflicts reports whether the kernel would refuse to listen on both. Port 0 is
// another port every time.
func (a address) conflicts(b address) bool {
	return a.port != 0 && a.port == b.port && (a.host == b.host || a.host == "" || b.host == "")
}
