package handoff

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A worker logs nothing of a session's record, which has its keys: in moves, in one that
// is called off, at its end, and when the record cannot be used.
func TestRecordIsNotLogged(t *testing.T) {
	var log testlog.Buffer
	opt := WithLogger(hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: &log}))
	a, b := startProc(t, echoHandler, opt), startProc(t, echoHandler, opt)
	s := software(t)
	a.give(s)
	s.say("x", "x")
	records := [][]byte{bytes.Clone(s.cargo.Record)}
	e := a.freeze(s)
	records = append(records, bytes.Clone(s.cargo.Record))
	broken := *s
	broken.cargo.Record = append(bytes.Clone(s.cargo.Record), 0)
	b.send(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{broken.item(e)}})
	b.expect(wire.TypeRefused)
	a.refs(wire.TypeThaw, s.ref(e))
	s.say("y", "y")
	move(s, a, b)
	records = append(records, bytes.Clone(s.cargo.Record))
	s.say("z", "z")
	_ = s.cli.CloseWrite()
	b.expectClosed(s, wire.ReasonPeer)
	a.inventory()
	text := log.String()
	if !strings.Contains(text, "session ended") {
		t.Fatalf("not the log: %q", text)
	}
	const part = 12 // bytes: less than a key, more than chance
	for _, r := range records {
		for i := 0; i+part <= len(r); i++ {
			p := r[i : i+part]
			list := strings.Trim(fmt.Sprint(p), "[]")
			for _, form := range []string{string(p), hex.EncodeToString(p), list, strings.ReplaceAll(list, " ", ", ")} {
				if strings.Contains(text, form) {
					t.Fatalf("bytes %d to %d of a record were logged", i, i+part)
				}
			}
		}
	}
}
