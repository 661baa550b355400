package handoff

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/cloudflare/tableflip"
)

// fakeFlip is tableflip between two Upgraders of one process, or between one and a
// script. A process of it dies when its died is closed.
type fakeFlip struct {
	t      *testing.T
	parent *fakeFlip
	spawn  func(*fakeFlip) // starts a new process; returns at once

	mu    sync.Mutex
	lns   map[string]*net.TCPListener
	files map[string]*os.File
	owned []io.Closer

	once, gone sync.Once
	ready      chan struct{}
	died       chan struct{}
	stopped    chan struct{}
	stopOnce   sync.Once
}

func newFlip(t *testing.T) *fakeFlip {
	f := &fakeFlip{t: t, lns: map[string]*net.TCPListener{}, files: map[string]*os.File{},
		ready: make(chan struct{}), died: make(chan struct{}), stopped: make(chan struct{})}
	t.Cleanup(f.closeAll)
	return f
}

func (f *fakeFlip) closeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.owned {
		_ = c.Close()
	}
	for _, file := range f.files {
		_ = file.Close()
	}
	f.owned, f.files = nil, map[string]*os.File{}
}

func (f *fakeFlip) ListenWithCallback(network, addr string, make func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l := f.lns[addr]; l != nil {
		return dupListener(l)
	}
	l, err := make(network, addr)
	if err != nil {
		return nil, err
	}
	dup, err := dupListener(l.(*net.TCPListener))
	if err != nil {
		return nil, err
	}
	f.lns[addr] = dup
	f.owned = append(f.owned, dup)
	return l, nil
}

func dupListener(l *net.TCPListener) (*net.TCPListener, error) {
	file, err := l.File()
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	dup, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	return dup.(*net.TCPListener), nil
}

func dupOf(file *os.File) (*os.File, error) {
	fd, err := dupFile(file)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

func (f *fakeFlip) AddFile(name string, file *os.File) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, err := dupOf(file)
	if err != nil {
		return err
	}
	if old := f.files[name]; old != nil {
		_ = old.Close()
	}
	f.files[name] = d
	return nil
}

func (f *fakeFlip) File(name string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.files[name] == nil {
		return nil, nil
	}
	return dupOf(f.files[name])
}

var errNewProcessDied = errors.New("the new process died")

func (f *fakeFlip) Upgrade() error {
	c := newFlip(f.t)
	c.parent = f
	f.mu.Lock()
	for addr, l := range f.lns {
		dup, err := dupListener(l)
		if err != nil {
			f.mu.Unlock()
			return err
		}
		c.lns[addr] = dup
		c.owned = append(c.owned, dup)
	}
	for name, file := range f.files {
		d, err := dupOf(file)
		if err != nil {
			f.mu.Unlock()
			return err
		}
		c.files[name] = d
	}
	f.mu.Unlock()
	f.spawn(c)
	select {
	case <-c.ready:
	case <-c.died:
		c.closeAll()
		return errNewProcessDied
	case <-f.stopped:
		return errors.New("terminating")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, file := range f.files {
		_ = file.Close()
		delete(f.files, name)
	}
	return nil
}

func (f *fakeFlip) Ready() error {
	f.once.Do(func() { close(f.ready) })
	return nil
}

func (f *fakeFlip) Stop() { f.stopOnce.Do(func() { close(f.stopped) }) }

func (f *fakeFlip) HasParent() bool { return f.parent != nil }

func (f *fakeFlip) WaitForParent(ctx context.Context) error {
	if f.parent == nil {
		return nil
	}
	select {
	case <-f.parent.died:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fakeFlip) fds() *tableflip.Fds { return nil }

func (f *fakeFlip) die() { f.gone.Do(func() { close(f.died) }) }
