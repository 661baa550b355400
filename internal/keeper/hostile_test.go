package keeper

import (
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

func mustEncode(t *testing.T, m *message) []byte {
	t.Helper()
	b, err := encMode.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Whatever comes on a channel costs that channel, with one line in the log, and
// nothing else.
func TestHostileMessages(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	s.ok(sockets)
	base := w.fds()
	for _, tc := range []struct {
		name  string
		raw   []byte
		fds   int
		first bool // instead of HELLO
	}{
		{name: "garbage", raw: []byte("GET / HTTP/1.1\r\n\r\n")},
		{name: "garbage with descriptors", raw: []byte{0xff, 0x00}, fds: 50},
		{name: "truncated", raw: mustEncode(t, &message{ID: 1, Op: opList, Kind: KindSocket})[:3]},
		{name: "trailing bytes", raw: append(mustEncode(t, &message{ID: 1, Op: opList}), 0)},
		{name: "oversized", raw: make([]byte, sys.MaxPacket+1), fds: 3},
		{name: "unknown operation", raw: mustEncode(t, &message{ID: 1, Op: 99}), fds: 0},
		{name: "a reply", raw: mustEncode(t, &message{ID: 1, Op: opReply, Code: replyChannel}), fds: 1},
		{name: "terminate", raw: mustEncode(t, &message{Op: opTerminate})},
		{name: "unknown field", raw: []byte{0xa3, 0x01, 0x01, 0x02, 0x05, 0x18, 0x63, 0x00}},
		{name: "field twice", raw: []byte{0xa3, 0x01, 0x01, 0x02, 0x05, 0x02, 0x05}},
		{name: "endless map", raw: []byte{0xbf, 0x01, 0x01, 0x02, 0x05, 0xff}},
		{name: "huge array announced", raw: []byte{0xa3, 0x01, 0x01, 0x02, 0x04, 0x05, 0x9b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}},
		{name: "negative id", raw: []byte{0xa2, 0x01, 0x20, 0x02, 0x05}},
		{name: "more descriptors than announced", raw: mustEncode(t, &message{ID: 1, Op: opPut, Entries: []wireEntry{{Kind: 1, FDs: 1}}}), fds: 2},
		{name: "fewer descriptors than announced", raw: mustEncode(t, &message{ID: 1, Op: opPut, Entries: []wireEntry{{Kind: 1, FDs: 9}}}), fds: 2},
		{name: "name too long", raw: mustEncode(t, &message{ID: 1, Op: opPut, Entries: []wireEntry{{Name: strings.Repeat("n", 256)}}})},
		{name: "meta too large", raw: mustEncode(t, &message{ID: 1, Op: opPut, Entries: []wireEntry{{Meta: make([]byte, MaxMeta+1)}}})},
		{name: "hello twice", raw: mustEncode(t, &message{ID: 1, Op: opHello, Version: 1}), fds: 1},
		{name: "no hello", raw: mustEncode(t, &message{ID: 1, Op: opLead}), first: true},
		{name: "hello without pidfd", raw: mustEncode(t, &message{ID: 1, Op: opHello, Version: 1}), first: true},
		{name: "hello with something else", raw: mustEncode(t, &message{ID: 1, Op: opHello, Version: 1}), fds: 1, first: true},
		{name: "hello with entries", raw: mustEncode(t, &message{ID: 1, Op: opHello, Version: 1, Entries: []wireEntry{{FDs: 4}}}), fds: 5, first: true},
		{name: "hello without version", raw: mustEncode(t, &message{ID: 1, Op: opHello}), fds: 1, first: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := strings.Count(w.log.String(), "closed the channel")
			cmd := command{Op: "raw", Raw: tc.raw, Count: tc.fds}
			if tc.first {
				cmd.Code = 1
			}
			if s.ok(cmd).N != 1 {
				t.Error("the keeper did not close the channel")
			}
			w.wantFDs(base)
			if !eventually(func() bool { return strings.Count(w.log.String(), "closed the channel") == before+1 }) {
				t.Error("want one line in the log")
			}
		})
	}
	wantSockets(t, s)
	s.ok(sockets)
}

// A request that is well-formed but not allowed gets an error, not a closed channel.
func TestNotAllowedIsNoAttack(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	a := w.lead()
	a.ok(command{Op: "successor"})
	b := w.next()
	b.refused(command{Op: "put", Kind: KindSocket, From: 1, Count: 3, FDs: 9, Tag: "x"}, "not leader")
	b.refused(command{Op: "delete", Kind: KindSocket, From: 1, Count: 3}, "not leader")
	if n := len(b.ok(command{Op: "get", Kind: KindSocket}).Found); n != 0 {
		t.Fatalf("%d entries stored by a process that does not lead", n)
	}
}

func FuzzDecode(f *testing.F) {
	b, _ := encode(&message{ID: 1, Op: opPut, Entries: []wireEntry{{Kind: KindSocket, ID: 9, FDs: 1, Meta: []byte("m")}}})
	f.Add(b, 1)
	f.Add([]byte{0xa2, 0x01, 0x01, 0x02, 0x05}, 0)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		m, err := decode(b, n)
		if err != nil {
			return
		}
		fds := 0
		for _, e := range m.Entries {
			fds += int(e.FDs)
			if len(e.Name) > MaxName || len(e.Meta) > MaxMeta {
				t.Fatalf("accepted %+v", e)
			}
		}
		if fds > n {
			t.Fatalf("%d descriptors announced, %d came", fds, n)
		}
		if _, err := decodeHead(append(b, 0xff)); err != nil {
			t.Fatalf("decode took what decodeHead refuses: %v", err)
		}
	})
}
