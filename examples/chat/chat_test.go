package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/ktlsvisor/ktlsvisor/handoff"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConversation(t *testing.T) {
	c := mustChat(t, "2")
	a, b := newWire(t, 1), newWire(t, 2)
	serve(t, c, a, b)
	defer hangUp(b)
	a.sees("* welcome, guest1: /join ROOM to talk, /help for more")
	a.types("hello?\n")
	a.sees("* you are in no room; /join ROOM first")
	a.types("/nick alice\n/join #ops\n")
	a.sees("* you are alice")
	a.sees("* you are in ops")
	a.types("early bird\n/version\n")
	a.sees(fmt.Sprintf("* chat with state version 2, process %d", os.Getpid()))
	b.types("/nick Alice\n/join ops\n")
	b.sees("* somebody in ops is called Alice; choose another name with /nick NAME and come again")
	b.types("/nick bob\n/join ops\n")
	b.sees("| <alice> early bird")
	b.sees("* you are in ops")
	a.sees("* bob joined ops")
	b.types("hi all\r\n")
	a.sees("<bob> hi all")
	a.types("/msg bob psst\n/msg carol psst\n/away at lunch\n")
	b.sees("[alice] psst")
	a.sees("* nobody here is called carol")
	a.sees("* you are away: at lunch")
	b.types("/who\n/msg alice there?\n")
	b.sees("* - alice (away: at lunch)")
	b.sees("* - bob")
	b.sees("* alice is away: at lunch")
	b.types("/nick alice\n/nick x y\n/nick robert\n/nosuch\n")
	b.sees("* somebody in ops is called alice")
	b.sees("* a name has 1 to 24 letters, digits, - or _")
	b.sees("* /nosuch is unknown; /help lists what there is")
	a.sees("* bob is robert now")
	b.types("/help\n")
	b.sees("* /away TEXT        say why you do not answer; /away alone: you are back")
	b.types("/join other\n")
	a.sees("* robert left ops")
	b.sees("* you are in other")
	b.types("/leave\n/leave\n")
	b.sees("* you left other")
	b.sees("* you are in no room")
	if b.Group() != "" {
		t.Errorf("after /leave in group %q", b.Group())
	}
	a.types("/quit\n")
	a.sees("* bye")
	if err := a.ended(); err != nil {
		t.Errorf("after /quit: %v", err)
	}
	if len(c.rooms.m) != 0 {
		t.Errorf("rooms nobody is in: %v", c.rooms.m)
	}
}

// Release 1 has no /away, and says so.
func TestRelease1(t *testing.T) {
	a := newWire(t, 1)
	serve(t, mustChat(t, "1"), a)
	defer hangUp(a)
	a.types("/away x\n/version\n")
	a.sees("* /away is unknown; /help lists what there is")
	a.sees(fmt.Sprintf("* chat with state version 1, process %d", os.Getpid()))
}

// Nick, room, history and the half-typed line live on in the next release, and
// nobody is told that anybody left or joined.
func TestUpgrade(t *testing.T) {
	one, two := mustChat(t, "1"), mustChat(t, "2")
	wires := enter(t, one, 2)
	a, b := wires[0], wires[1]
	a.types("before\n")
	b.sees("<a> before")
	a.types("half-ty")
	a.settled()
	freeze(t, a, b)
	move(t, one, two, "ops", a, b)
	if s := a.seen() + b.seen(); s != "" {
		t.Errorf("the move was noticed: %q", s)
	}
	a.types("ped\n/away gone\n")
	b.sees("<a> half-typed")
	a.sees("* you are away: gone")
	b.types("/who\n")
	b.sees("* - a (away: gone)")
	b.sees("* - b")
	c := newWire(t, 3)
	serve(t, two, c)
	c.types("/join ops\n")
	c.sees("| <a> before")
	hangUp(a, b, c)
	if len(one.rooms.m)+len(two.rooms.m) != 0 {
		t.Errorf("rooms nobody is in: %v, %v", one.rooms.m, two.rooms.m)
	}
}

// What is said while some members have stopped and others have not reaches
// everyone once, whether the move happens or is called off.
func TestSaidDuringMove(t *testing.T) {
	for _, happens := range []bool{true, false} {
		one, two := mustChat(t, "1"), mustChat(t, "2")
		wires := enter(t, one, 4)
		freeze(t, wires[:2]...)
		wires[2].types("during\n")
		wires[3].sees("<c> during")
		freeze(t, wires[2:]...)
		wires[1].types("early\n") // arrives while nobody owns the session
		if happens {
			move(t, one, two, "ops", wires...)
		} else {
			move(t, one, one, "ops", wires...)
		}
		for _, w := range wires[:2] {
			w.sees("<c> during")
		}
		wires[1].settled()
		for i, w := range wires {
			want := "<b> early\n"
			if i == 1 {
				want = ""
			}
			if s := w.seen(); s != want {
				t.Errorf("move %t: client %d was shown %q, want %q", happens, w.id, s, want)
			}
		}
		wires[0].types("after\n")
		wires[0].settled()
		for i, w := range wires {
			want := "<a> after\n"
			if i == 0 {
				want = ""
			}
			if s := w.seen(); s != want {
				t.Errorf("move %t: client %d was shown %q, want %q", happens, w.id, s, want)
			}
		}
		hangUp(wires...)
	}
}

// A move that is called off before everybody had stopped: some handlers start
// again and take their own places.
func TestThawOfSome(t *testing.T) {
	c := mustChat(t, "1")
	wires := enter(t, c, 3)
	freeze(t, wires[0])
	wires[1].types("still here\n")
	wires[2].sees("<b> still here")
	wires[0].set(func() { wires[0].moving = false })
	serve(t, c, wires[0])
	wires[0].settled()
	wires[0].sees("<b> still here")
	wires[1].types("/who\n")
	wires[1].sees("* - a")
	wires[1].types("once\n")
	wires[1].settled()
	if s := wires[0].seen(); s != "<b> once\n" {
		t.Errorf("after the move was called off: %q", s)
	}
	hangUp(wires...)
}

// A room comes back to a process where it has been before, with members who
// came and went meanwhile.
func TestThereAndBack(t *testing.T) {
	one, two := mustChat(t, "1"), mustChat(t, "1")
	wires := enter(t, one, 3)
	freeze(t, wires...)
	move(t, one, two, "ops", wires...)
	hangUp(wires[2])
	for _, w := range wires[:2] {
		w.sees("* c left ops")
	}
	freeze(t, wires[:2]...)
	move(t, two, one, "ops", wires[:2]...)
	wires[0].types("/who\n")
	wires[0].settled()
	if s := wires[0].seen(); s != "* in ops:\n* - a\n* - b\n" {
		t.Errorf("who: %q", s)
	}
	hangUp(wires[:2]...)
}

// Joining a room that lives in another process goes on there, and the rest of
// what was typed too.
func TestJoinElsewhere(t *testing.T) {
	one, two := mustChat(t, "2"), mustChat(t, "2")
	there := enter(t, two, 1)[0]
	w := newWire(t, 9)
	w.home = "ops"
	serve(t, one, w)
	w.types("/nick z\n/join ops\nhello\n")
	if err := w.ended(); !errors.Is(err, handoff.ErrMoving) {
		t.Fatalf("the handler returned %v", err)
	}
	serve(t, two, w)
	w.sees("* you are in ops")
	there.sees("* z joined ops")
	there.sees("<z> hello")
	w.settled()
	hangUp(w, there)
	if s := there.seen(); s != "* z left ops\n" {
		t.Errorf("then %q", s)
	}
}

func TestRefusedRoom(t *testing.T) {
	c := mustChat(t, "1")
	w := newWire(t, 1)
	w.refuse = errors.New("the group is full")
	serve(t, c, w)
	w.types("/join ops\nhello\n")
	w.sees("* you cannot join ops: the group is full")
	w.sees("* you are in no room; /join ROOM first")
	hangUp(w)
}

// The owner died: what the member was is gone, but it is in its room and told.
func TestAfterCrash(t *testing.T) {
	c := mustChat(t, "1")
	if err := c.rooms.AdoptGroup("ops", nil); err != nil {
		t.Fatal(err)
	}
	a, b := newWire(t, 1), newWire(t, 2)
	for _, w := range []*wire{a, b} {
		w.crashed, w.group = true, "ops"
	}
	serve(t, c, a, b)
	a.sees("* the chat crashed; you are still connected, but are called guest1 now: see /nick")
	a.settled()
	b.settled()
	a.types("anybody?\n")
	b.sees("<guest1> anybody?")
	hangUp(a, b)
}

// One who does not read holds up the room once and is shown out; the others go
// on.
func TestSlowMember(t *testing.T) {
	c := mustChat(t, "1")
	wires := enter(t, c, 3)
	wires[2].set(func() { wires[2].full = true })
	wires[0].types("hello\n")
	if err := wires[2].ended(); !errors.Is(err, errSlow) {
		t.Errorf("the slow one's handler returned %v", err)
	}
	wires[1].sees("<a> hello")
	wires[1].sees("* c left ops")
	hangUp(wires[:2]...)
}

func TestStopping(t *testing.T) {
	w := newWire(t, 1)
	serve(t, mustChat(t, "1"), w)
	w.settled()
	w.set(func() { w.inEnd = handoff.ErrStopping })
	w.sees("* the chat closes down")
	if err := w.ended(); !errors.Is(err, handoff.ErrStopping) {
		t.Errorf("the handler returned %v", err)
	}
}

// Bytes that are no state of ours end that session with words, and nothing else.
func TestBadState(t *testing.T) {
	c := mustChat(t, "1")
	w := newWire(t, 1)
	w.state = []byte("junk")
	serve(t, c, w)
	if err := w.ended(); err == nil || !strings.Contains(err.Error(), "member 1") {
		t.Errorf("the handler returned %v", err)
	}
	if err := c.rooms.AdoptGroup("ops", []byte("junk")); err == nil || len(c.rooms.m) != 0 {
		t.Errorf("a room of junk: %v, %v", err, c.rooms.m)
	}
}
