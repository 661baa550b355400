package supervise

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Keys in the ledger and in sockets: how this process gets at both, and how it finds out
// how far a change of keys had come when an owner died.

// keySetter reads and sets keys of sockets; tests play the kernel.
type keySetter interface {
	position(fd int, k *ktls.KeyChange) (next bool, seq uint64, err error)
	apply(fd int, k *ktls.KeyChange) error
}

type kernelKeys struct{}

func (kernelKeys) position(fd int, k *ktls.KeyChange) (bool, uint64, error) { return k.Position(fd) }
func (kernelKeys) apply(fd int, k *ktls.KeyChange) error                    { return k.Apply(fd) }

// enterKeys puts a new session's secrets into its slot.
func (s *Supervisor) enterKeys(slot int, secrets []byte) error {
	if len(secrets) == 0 {
		return nil
	}
	sec, err := ktls.ParseSecrets(secrets)
	wipe(secrets)
	if err != nil {
		return err
	}
	defer sec.Wipe()
	if len(sec.TX) == 0 {
		return nil // TLS 1.2
	}
	return s.led.initKeys(slot, sec.TX, sec.RX)
}

// keyChange is the next step of a direction, and what the ledger says of it. The
// secrets in it are wiped by forget.
func (s *Supervisor) keyChange(ss *session, d ktls.Direction) (*ktls.KeyChange, keyState, error) {
	k := s.led.keys(int(ss.slot), d)
	if k.current == nil {
		return nil, k, errors.New("the ledger has no secrets of it")
	}
	f, err := ss.allFacts(s.led)
	if err != nil {
		return nil, k, err
	}
	c := &ktls.KeyChange{Suite: f.Suite, Direction: d, Current: k.current, Next: k.next}
	if c.Next == nil {
		if k.gen >= maxKeyGen {
			return nil, k, errors.New("its keys have changed too often")
		}
		if c.Next, err = ktls.NextSecret(c.Suite, c.Current); err != nil {
			return nil, k, err
		}
	}
	return c, k, nil
}

func forget(c *ktls.KeyChange) {
	wipe(c.Current)
	wipe(c.Next)
}

// onSocket runs f with a duplicate of a session's socket, away from the goroutine that
// owns the ledger, and then there.
func (s *Supervisor) onSocket(ss *session, f func(fd int) error, then func(error)) {
	r := ss.change()
	r.ops++
	s.keyOps++
	withSocket := s.socketOf(ss)
	go func() {
		err := withSocket(f)
		// Nothing was done then. The keeper may be short of something for a moment, and a
		// session is at stake.
		for tries := 0; tries < socketTries && errors.Is(err, errNoSocket); tries++ {
			select {
			case <-s.ctx.Done():
			case <-time.After(socketPause):
			}
			err = withSocket(f)
		}
		s.post(func() {
			s.keyOps--
			r.ops--
			if s.sessions[ss.ID] != ss {
				return
			}
			if r.settled != nil {
				if r.ops == 0 {
					f := r.settled
					r.settled = nil
					f()
				}
				return
			}
			then(err)
			ss.rest()
		})
	}()
}

// How often, and how far apart, a socket is asked for.
const (
	socketTries = 20
	socketPause = 500 * time.Millisecond
)

var errNoSocket = errors.New("its socket could not be fetched from the keeper")

// socketOf says how to get at a session's socket, from anywhere.
func (s *Supervisor) socketOf(ss *session) func(f func(fd int) error) error {
	if w := ss.owner(); w != nil && ss.away {
		proc, pid, cookie := w.proc, w.pid, s.cookie(ss)
		return func(f func(fd int) error) error {
			ctx, cancel := context.WithTimeout(s.ctx, takeTimeout)
			defer cancel()
			return borrowed(ctx, proc, pid, cookie, f)
		}
	}
	id := ss.ID
	return func(f func(fd int) error) error { return s.withSocket(id, f) }
}

func (s *Supervisor) withSocket(id uint64, f func(fd int) error) error {
	ctx, cancel := context.WithTimeout(s.ctx, keeperTimeout)
	defer cancel()
	entries, err := s.keeper.Get(ctx, keeper.KindSocket, id)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoSocket, err)
	}
	err = errNoSocket
	for i := range entries {
		if len(entries[i].FDs) == 1 && entries[i].Key.ID == id {
			err = f(entries[i].FDs[0])
		}
		sys.CloseAll(entries[i].FDs)
	}
	return err
}

// settleKeys brings the keys of a session whose owner has been seen dead in order, and
// then calls done. The socket says how far a change of keys came; on any doubt the
// session is lost.
func (s *Supervisor) settleKeys(ss *session, done func()) {
	again := false
	if r := ss.rekey; r != nil {
		if r.ops > 0 {
			r.settled = func() { s.settleKeys(ss, done) }
			return
		}
		for _, f := range r.waiters {
			f(errors.New("its worker died"))
		}
		again, ss.rekey = r.again, nil
	}
	rx, tx := s.led.keys(int(ss.slot), ktls.Receiving), s.led.keys(int(ss.slot), ktls.Sending)
	defer rx.wipe()
	defer tx.wipe()
	if rx.next == nil && tx.next == nil {
		done()
		return
	}
	var steps []func(fd int) error
	var then []func()
	if rx.next != nil {
		c, k, err := s.keyChange(ss, ktls.Receiving)
		if err != nil {
			s.lose(ss, err.Error())
			return
		}
		steps = append(steps, func(fd int) error { defer forget(c); return s.keys.apply(fd, c) })
		then = append(then, func() { s.led.complete(int(ss.slot), ktls.Receiving, k.gen); s.led.count(cntKeyUpdates, 1) })
	}
	if tx.next != nil {
		c, k, err := s.keyChange(ss, ktls.Sending)
		if err != nil {
			s.lose(ss, err.Error())
			return
		}
		sent := false
		steps = append(steps, func(fd int) error {
			defer forget(c)
			next, seq, err := s.keys.position(fd, c)
			switch {
			case err != nil:
				return err
			case next:
				sent = true
				return nil
			case seq == k.seq:
				return nil // the KeyUpdate was not sent
			case seq == k.seq+1:
				sent = true
				return s.keys.apply(fd, c)
			}
			return doubt(nil, k.seq, seq)
		})
		then = append(then, func() {
			if !sent {
				s.led.abort(int(ss.slot), ktls.Sending)
				return
			}
			ss.change().asked, ss.change().again = ss.owes, again
			s.sentKeySet(ss, k.gen)
		})
	}
	s.onSocket(ss, func(fd int) error {
		for _, f := range steps {
			if err := f(fd); err != nil {
				return err
			}
		}
		return nil
	}, func(err error) {
		if err != nil {
			s.lose(ss, "its worker died while its keys were changed, and they are in doubt: "+err.Error())
			return
		}
		for _, f := range then {
			f()
		}
		ss.rekey = &rekeying{}
		done()
	})
}
