package supervise

import (
	"context"
	"net"

	"github.com/hashicorp/go-hclog"
)

// Crafted is a session whose keys were agreed on without a handshake: benchmarks have
// thousands of sessions in this way, and their clients need no memory.
type Crafted struct {
	Version, Suite uint16
	Facts, Record  []byte // what ktls.Import takes
	// Secrets is what ktls.State.MarshalSecrets would write: in the kernel layer, whose
	// keys must be in the socket already. Nil in the software layer.
	Secrets []byte
}

// MainCrafting is Main with craft in the place of every handshake. Nothing but a
// benchmark may call it: whoever connects has a session then.
func MainCrafting(ctx context.Context, log hclog.Logger, version string, craft func(*net.TCPConn) (*Crafted, error)) int {
	return serve(ctx, log, version, craft)
}

// crafted is handshake without one; it owns dup likewise.
func (f *front) crafted(l *listener, c *net.TCPConn, dup int) error {
	k, err := f.craft(c)
	if err != nil {
		return err
	}
	a := &admission{fd: dup, software: k.Secrets == nil, secrets: k.Secrets, record: k.Record,
		facts: facts{Pool: l.pool, Peer: c.RemoteAddr().String(), Version: k.Version, Suite: k.Suite, Facts: k.Facts}}
	_ = c.Close() // one of two duplicates
	f.admit(a)
	return nil
}
