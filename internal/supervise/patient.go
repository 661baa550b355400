package supervise

import (
	"context"
	"errors"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// patientStore asks the keeper again, for a while, when this process or the keeper is short
// of descriptors or memory: sessions are at stake, and shortages pass.
type patientStore struct{ store }

// How long, and how far apart.
const (
	shortageLimit = 3 * time.Second
	shortagePause = 20 * time.Millisecond
)

// short says that an error is about descriptors or memory that others may give back.
func short(err error) bool {
	return wire.Shortage(err) || errors.Is(err, sys.ErrControlTruncated) || errors.Is(err, keeper.ErrFull)
}

// patiently calls f until it does not fail for want of something, or the time is over.
// Nothing tells when a shortage ends.
func patiently(ctx context.Context, f func() error) error {
	for began := time.Now(); ; time.Sleep(shortagePause) {
		err := f()
		if !short(err) || time.Since(began) > shortageLimit || ctx.Err() != nil {
			return err
		}
	}
}

func (p patientStore) Get(ctx context.Context, kind keeper.Kind, ids ...uint64) (list []keeper.Entry, err error) {
	err = patiently(ctx, func() (err error) {
		list, err = p.store.Get(ctx, kind, ids...)
		return err
	})
	return list, err
}

func (p patientStore) List(ctx context.Context, kind keeper.Kind) (list []keeper.Entry, err error) {
	err = patiently(ctx, func() (err error) {
		list, err = p.store.List(ctx, kind)
		return err
	})
	return list, err
}

func (p patientStore) Put(ctx context.Context, entries ...keeper.Entry) error {
	return patiently(ctx, func() error { return p.store.Put(ctx, entries...) })
}

func (p patientStore) Delete(ctx context.Context, keys ...keeper.Key) error {
	return patiently(ctx, func() error { return p.store.Delete(ctx, keys...) })
}

// parkedInVain sends sessions back to w that it has parked, because this process had no
// room for the descriptors of their state. The worker is not to blame.
func (s *Supervisor) parkedInVain(w *worker, m *wire.Message) {
	for i := range m.Items {
		ref := m.Items[i].Ref
		if ss := s.sessions[ref.ID]; ss != nil && ss.Owner == &w.Worker && ss.Try != nil && ss.Try.Epoch == ref.Epoch {
			s.refuse(ss.Try, "the supervisor is out of descriptors; raise its NOFILE limit")
		}
	}
}
