package supervise

import (
	"context"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// faulty is s itself, but in programs that were built to be made to fail.
func faulty(s store) store {
	if fault.Enabled {
		return &faultyStore{s}
	}
	return s
}

// faultyStore has a step before and after everything that is asked of the keeper.
type faultyStore struct{ store }

func around(what string, kind keeper.Kind, call func() error) error {
	step := "keeper-" + what + "-" + kind.String()
	if err := fault.At("before-" + step).Err; err != nil {
		return fmt.Errorf("sendmsg: %w", err)
	}
	err := call()
	fault.Step("after-" + step)
	return err
}

func (f *faultyStore) Put(ctx context.Context, entries ...keeper.Entry) error {
	return around("put", entries[0].Key.Kind, func() error { return f.store.Put(ctx, entries...) })
}

func (f *faultyStore) Get(ctx context.Context, kind keeper.Kind, ids ...uint64) (list []keeper.Entry, err error) {
	err = around("get", kind, func() (err error) {
		list, err = f.store.Get(ctx, kind, ids...)
		return err
	})
	if err != nil {
		for i := range list {
			sys.CloseAll(list[i].FDs)
		}
		list = nil
	}
	return list, err
}

func (f *faultyStore) List(ctx context.Context, kind keeper.Kind) (list []keeper.Entry, err error) {
	err = around("list", kind, func() (err error) {
		list, err = f.store.List(ctx, kind)
		return err
	})
	return list, err
}

func (f *faultyStore) Delete(ctx context.Context, keys ...keeper.Key) error {
	return around("delete", keys[0].Kind, func() error { return f.store.Delete(ctx, keys...) })
}
