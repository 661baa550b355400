package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Workers that speak the protocol themselves, wrongly.

func init() {
	// They never get ready.
	roles["exits"] = func() int { fmt.Println("I give up"); return 3 }
	roles["silent"] = func() int { return waitForEnd(nil) }
	roles["says-hello-only"] = func() int { return waitForEnd(hello(wire.Version)) }
	roles["speaks-the-future"] = func() int { return waitForEnd(hello(99)) }
	roles["ready-before-hello"] = func() int { return waitForEnd(&wire.Message{Type: wire.TypeReady}) }
	roles["not-cbor"] = func() int { return waitForEnd([]byte("\xff\x00this is no CBOR")) }
	roles["oversized"] = func() int { return waitForEnd(make([]byte, 150<<10)) }
	roles["empty-message"] = func() int { return waitForEnd([]byte{}) }

	// They get ready, and then get sessions.
	roles["dies-adopting"] = func() int { return rawWorker(func(*wire.Channel, *wire.Message) bool { return false }) }
	roles["refuses"] = func() int {
		return rawWorker(func(ch *wire.Channel, m *wire.Message) bool {
			r := &wire.Message{Type: wire.TypeRefused}
			for _, it := range m.Items {
				r.Refused = append(r.Refused, wire.Refused{Ref: it.Ref, Why: "this one does not like it"})
			}
			return ch.Send(r) == nil
		})
	}
	roles["ignores-adopt"] = func() int { return rawWorker(func(*wire.Channel, *wire.Message) bool { return true }) }
	roles["garbage-on-adopt"] = func() int {
		return rawWorker(func(*wire.Channel, *wire.Message) bool {
			_, err := syscall.Write(wire.ChannelFD, []byte("nonsense"))
			return err == nil
		})
	}

	// They serve well as echo workers, and misbehave when they get SIGUSR1.
	for name, text := range attacks {
		roles["echo-"+name] = func() int { return echoThen(text) }
	}
}

func hello(version uint32) *wire.Message {
	return &wire.Message{Type: wire.TypeHello, Hello: &wire.Hello{Min: version, Max: version, PID: os.Getpid(), Name: "e2e"}}
}

// waitForEnd sends one message, if any, and then lives until it is killed or the
// channel ends.
func waitForEnd(m any) int {
	ch, err := wire.NewChannel(wire.ChannelFD)
	if err != nil {
		return exitOf(err)
	}
	switch m := m.(type) {
	case *wire.Message:
		err = ch.Send(m)
	case []byte:
		_, err = syscall.Write(wire.ChannelFD, m)
	}
	if err != nil {
		return exitOf(err)
	}
	for {
		if _, err := ch.Recv(); err != nil {
			return 0
		}
	}
}

// rawWorker gets ready and leaves every ADOPT to f; the first one of the pool does,
// that is, and the others are echo workers. The argument is a directory for that.
// It exits when f says false.
func rawWorker(f func(*wire.Channel, *wire.Message) bool) int {
	if !first("culprit") {
		return echoWorker()
	}
	ch, err := wire.NewChannel(wire.ChannelFD)
	if err == nil {
		err = errors.Join(ch.Send(hello(wire.Version)), ch.Send(&wire.Message{Type: wire.TypeReady}))
	}
	if err != nil {
		return exitOf(err)
	}
	for {
		m, err := ch.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return 0
		case err != nil:
			return exitOf(err)
		case m.Type == wire.TypeStop:
			return 0
		case m.Type == wire.TypeAdopt && !f(ch, m):
			return 7
		}
		m.CloseSockets()
	}
}

// first says whether this process is the first to ask, in the directory that the
// argument names.
func first(name string) bool {
	f, err := os.OpenFile(filepath.Join(os.Args[1], name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

func echoWorker() int {
	return exitOf(handoff.Serve(context.Background(), handoff.HandlerFunc(func(_ context.Context, c *handoff.Conn) error {
		_, err := io.Copy(c, c)
		return err
	})))
}

// attacks are what a worker may send on its channel beside what the SDK sends. The
// sessions that it claims are those with the ids 1 to 40, most of which are not its
// own.
var attacks = map[string]func(fd int) error{
	"garbage":   func(fd int) error { _, err := syscall.Write(fd, []byte("\xa1\x00\xf6 nonsense")); return err },
	"oversized": func(fd int) error { _, err := syscall.Write(fd, make([]byte, 150<<10)); return err },
	"bomb":      func(fd int) error { _, err := syscall.Write(fd, []byte(strings.Repeat("\x81", 4096))); return err },
	"array-bomb": func(fd int) error {
		_, err := syscall.Write(fd, []byte("\xa1\x05\x9b\x7f\xff\xff\xff\xff\xff\xff\xff"))
		return err
	},
	"unknown-type": func(fd int) error {
		_, err := syscall.Write(fd, []byte{0xa1, 0x00, 0x18, 99})
		return err
	},
	"order-of-the-supervisor": sendRaw(&wire.Message{Type: wire.TypeFreeze, Refs: refs()}),
	"second-hello":            sendRaw(hello(wire.Version)),
	"closes-what-is-not-its-own": func(fd int) error {
		m := &wire.Message{Type: wire.TypeClosed}
		for _, r := range refs() {
			m.Closed = append(m.Closed, wire.Closed{Ref: r, Reason: wire.ReasonPeer})
		}
		return sendRaw(m)(fd)
	},
	"parks-what-is-not-its-own": func(fd int) error {
		m := &wire.Message{Type: wire.TypeParked}
		for _, r := range refs() {
			m.Items = append(m.Items, wire.Item{Ref: r, Cargo: wire.Cargo{Record: []byte("made up")}})
		}
		return sendRaw(m)(fd)
	},
	"pong-for-no-ping": sendRaw(&wire.Message{Type: wire.TypePong, Nonce: 1 << 40}),
	"descriptors": func(fd int) error {
		b, err := wire.Encode(&wire.Message{Type: wire.TypePong})
		if err != nil {
			return err
		}
		return syscall.Sendmsg(fd, b, syscall.UnixRights(0, 1, 2, 0, 1, 2), nil, 0)
	},
}

// harmless are messages that may be late ones, so nothing may come of them at all.
var harmless = map[string]func(fd int) error{
	"adopts-what-it-was-not-given":  sendRaw(&wire.Message{Type: wire.TypeAdopted, Refs: refs()}),
	"refuses-what-it-was-not-given": sendRaw(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: refs()[0], Why: "no"}}}),
	"unasked-inventory":             sendRaw(&wire.Message{Type: wire.TypeInventoryReply, Nonce: 1, Last: true}),
	"second-ready":                  sendRaw(&wire.Message{Type: wire.TypeReady}),
	"unasked-pong":                  sendRaw(&wire.Message{Type: wire.TypePong, Nonce: 77}),
}

func init() {
	for name, f := range harmless {
		roles["echo-"+name] = func() int { return echoThen(f) }
	}
}

func refs() (list []wire.Ref) {
	for id := range uint64(40) {
		list = append(list, wire.Ref{ID: id + 1, Epoch: wire.NewEpoch(77, uint32(id+1))})
	}
	return list
}

func sendRaw(m *wire.Message) func(fd int) error {
	return func(fd int) error {
		b, err := wire.Encode(m)
		if err != nil {
			return err
		}
		_, err = syscall.Write(fd, b)
		return err
	}
}

// echoThen is an echo worker that attacks on its channel when it gets SIGUSR1.
func echoThen(attack func(fd int) error) int {
	fd, err := sys.Dup(wire.ChannelFD)
	if err != nil {
		return exitOf(err)
	}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGUSR1)
	go func() {
		<-sig
		fmt.Println("attack:", attack(fd))
		// The channel must not stay open because of this duplicate.
		sys.CloseAll([]int{fd})
	}()
	return echoWorker()
}

func init() { roles["prints"] = prints }

// prints is an echo worker that prints whatever it should not, and then closes its
// output.
func prints() int {
	go func() {
		long := []byte(strings.Repeat("x", 1<<20))
		binary := make([]byte, 4096)
		for i := range binary {
			binary[i] = byte(i * 7)
		}
		for _, f := range []*os.File{os.Stdout, os.Stderr} {
			for _, b := range [][]byte{
				[]byte(`{"@message":1}` + "\n"), []byte(`{"@level":{},"@timestamp":[],"@message":"x"}` + "\n"),
				binary, long, []byte("\n\n\x1b[2J\x1b]0;title\x07\n"), []byte("panicking not, only printing\n"),
			} {
				if _, err := f.Write(b); err != nil {
					os.Exit(8) // the unit must take what a worker prints
				}
			}
			if _, err := fmt.Fprintln(f, "that was all"); err != nil {
				os.Exit(8)
			}
			_ = f.Close()
		}
	}()
	return echoWorker()
}

// neverEnds ignores STOP for ever.
func neverEnds() int {
	go echoWorker()
	for {
		time.Sleep(time.Hour)
	}
}

func init() { roles["never-ends"] = neverEnds }
