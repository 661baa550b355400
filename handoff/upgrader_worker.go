package handoff

import (
	"slices"
	"sync"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// What the host does with the worker of its own process besides messages: a program
// that is its own supervisor needs no second descriptor of each session, and no third
// party for its keys.

// vault has the traffic secrets of sessions in the kernel layer while they are on no
// Conn.
type vault struct {
	mu   sync.Mutex
	keys map[uint64][]byte // as ktls.State.MarshalSecrets writes them
}

func newVault() *vault { return &vault{keys: map[uint64][]byte{}} }

func (v *vault) put(id uint64, secrets []byte) {
	if len(secrets) == 0 {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	clear(v.keys[id])
	v.keys[id] = secrets
}

// drop wipes.
func (v *vault) drop(id uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	clear(v.keys[id])
	delete(v.keys, id)
}

// copyOf is the caller's, who wipes it.
func (v *vault) copyOf(id uint64) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.keys[id])
}

// give lets a session that was imported change its keys by itself. Without secrets, or
// where the kernel cannot change keys, a KeyUpdate of the peer's ends it.
func (v *vault) give(id uint64, t *ktls.Conn) {
	b := v.copyOf(id)
	defer clear(b)
	if len(b) > 0 && t.SetSecrets(b) == nil {
		v.drop(id)
	}
}

// keep takes the secrets of a session that leaves its Conn.
func (v *vault) keep(id uint64, st *ktls.State) {
	if st.Layer() != ktls.LayerKernel {
		return // they are in its record
	}
	if b, err := st.MarshalSecrets(); err == nil {
		v.put(id, b)
	}
}

// luggage is what a parked session has in its process that PARKED does not say. fd is
// a duplicate of its socket and the receiver's; -1 when it is not there, for err.
type luggage struct {
	fd    int
	facts []byte
	err   error
}

// luggageOf gathers the luggage of parked sessions and gives it to f, in the worker's
// loop.
func (w *worker) luggageOf(refs []wire.Ref, f func([]luggage)) {
	w.in.post(func() {
		l := make([]luggage, len(refs))
		for i, r := range refs {
			l[i].fd = -1
			s := w.sessions[r.ID]
			if s == nil || s.kept == nil || s.attempt != r.Epoch {
				continue // THAW is on its way to it, or its end to the host
			}
			rc, err := s.kept.sock.SyscallConn()
			if err == nil {
				if cerr := rc.Control(func(fd uintptr) { l[i].fd, err = sys.Dup(int(fd)) }); cerr != nil {
					err = cerr
				}
			}
			if err == nil {
				l[i].facts, err = s.kept.facts.MarshalFacts()
			}
			l[i].err = err
		}
		f(l)
	})
}
