package keeper

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// window is how many batches of one Put may be unacknowledged. Together they
// stay far below the limit of descriptors in flight of a machine's defaults.
const window = 4

// Put stores entries. An entry with the same key is replaced at once, its
// descriptors closed. Descriptors are duplicated; the caller keeps its own. Large
// puts travel in several messages: on an error, which names the first key of the
// batch that failed or the key itself, entries of other batches may be stored.
func (c *Client) Put(ctx context.Context, entries ...Entry) error {
	for i := range entries {
		if err := entries[i].validate(); err != nil {
			return wrap("store", err)
		}
	}
	var sent []*batch
	var first error
	settle := func(limit int) {
		for len(sent) > limit {
			if err := sent[0].settle(ctx, c); err != nil && first == nil {
				first = err
			}
			sent = sent[1:]
		}
	}
	started := time.Now()
	for len(entries) > 0 && first == nil {
		n := pageOf(len(entries), func(i int) (size, fds int) {
			return len(entries[i].Key.Name) + len(entries[i].Meta), len(entries[i].FDs)
		})
		b := &batch{entries: entries[:n]}
		err := b.start(ctx, c)
		if errors.Is(err, sys.ETOOMANYREFS) && time.Since(started) < inFlightLimit && ctx.Err() == nil {
			// The kernel takes no more descriptors in flight: let the keeper
			// receive ours, or, when there are none, others receive theirs.
			if len(sent) > 0 {
				settle(0)
			} else {
				time.Sleep(10 * time.Millisecond)
			}
			continue
		}
		if err != nil {
			first = wrap("store "+entries[0].Key.String(), err)
			break
		}
		entries = entries[n:]
		sent = append(sent, b)
		settle(window - 1)
	}
	settle(0)
	return first
}

// batch is the part of a Put that travels in one message.
type batch struct {
	entries []Entry
	call    *call
}

func (b *batch) start(ctx context.Context, c *Client) (err error) {
	m := &message{Op: opPut, Entries: make([]wireEntry, 0, len(b.entries))}
	var fds []int
	for i := range b.entries {
		e := &b.entries[i]
		m.Entries = append(m.Entries, wireEntry{
			Kind: e.Key.Kind, ID: e.Key.ID, Name: e.Key.Name, Meta: e.Meta, FDs: uint8(len(e.FDs)),
		})
		fds = append(fds, e.FDs...)
	}
	b.call, err = c.start(ctx, m, fds)
	return err
}

func (b *batch) settle(ctx context.Context, c *Client) error {
	replies, err := c.wait(ctx, b.call)
	if err != nil {
		return wrap("store "+b.entries[0].Key.String(), err)
	}
	closeReplies(replies)
	return nil
}

// Get returns entries of a kind with fresh duplicates of their descriptors, which
// the caller owns: those with the ids, whatever their names, or, when no id is
// given, all of the kind (mind an empty list). Unknown ids are left out. All of
// them are as they were at one moment, for up to 4096 ids. On an error everything
// received is closed.
func (c *Client) Get(ctx context.Context, kind Kind, ids ...uint64) ([]Entry, error) {
	if len(ids) == 0 {
		return c.fetch(ctx, &message{Op: opGet, Kind: kind})
	}
	var out []Entry
	for len(ids) > 0 {
		n := min(len(ids), maxIDs)
		got, err := c.fetch(ctx, &message{Op: opGet, Kind: kind, IDs: ids[:n]})
		if err != nil {
			for i := range out {
				sys.CloseAll(out[i].FDs)
			}
			return nil, err
		}
		out = append(out, got...)
		ids = ids[n:]
	}
	return out, nil
}

// List returns all entries of a kind, without descriptors, in no order.
func (c *Client) List(ctx context.Context, kind Kind) ([]Entry, error) {
	return c.fetch(ctx, &message{Op: opList, Kind: kind})
}

func (c *Client) fetch(ctx context.Context, m *message) ([]Entry, error) {
	cl, err := c.start(ctx, m, nil)
	if err != nil {
		return nil, fmt.Errorf("fetch %s entries: %w", m.Kind, err)
	}
	replies, err := c.wait(ctx, cl)
	if err != nil {
		return nil, fmt.Errorf("fetch %s entries: %w", m.Kind, err)
	}
	var out []Entry
	for _, r := range replies {
		fds := r.fds
		for i := range r.msg.Entries {
			w := &r.msg.Entries[i]
			n := int(w.FDs)
			e := Entry{Key: Key{Kind: w.Kind, ID: w.ID, Name: w.Name}, Meta: w.Meta}
			if n > 0 {
				e.FDs = append([]int(nil), fds[:n]...)
			}
			fds = fds[n:]
			out = append(out, e)
		}
	}
	return out, nil
}

// Delete removes entries; the keeper closes their descriptors. Keys that are not
// there are no error.
func (c *Client) Delete(ctx context.Context, keys ...Key) error {
	for len(keys) > 0 {
		n := pageOf(len(keys), func(i int) (size, fds int) { return len(keys[i].Name), 0 })
		m := &message{Op: opDelete, Entries: make([]wireEntry, 0, n)}
		for _, key := range keys[:n] {
			if err := (&Entry{Key: key}).validate(); err != nil {
				return wrap("delete", err)
			}
			m.Entries = append(m.Entries, wireEntry{Kind: key.Kind, ID: key.ID, Name: key.Name})
		}
		if _, err := c.ask(ctx, m, nil); err != nil {
			return wrap("delete "+keys[0].String(), err)
		}
		keys = keys[n:]
	}
	return nil
}

func valid(text string) string { return strings.ToValidUTF8(text, "?") }
