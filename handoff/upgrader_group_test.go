package handoff

import (
	"fmt"
	"testing"
	"time"
)

// Groups move as one, and a group lives in one process.
func TestUpgraderMovesGroups(t *testing.T) {
	newRoom := func() (*roomGroups, HandlerFunc) {
		g := newRoomGroups()
		return g, g.serve
	}
	g1, h1 := newRoom()
	p := startUpgrader(t, newFlip(t), h1, WithGroups(g1))
	var cl []uclient
	for range 80 { // more than a message holds
		c := p.dial()
		c.say("join lobby\n", "joined lobby\n")
		cl = append(cl, c)
	}
	cl[0].say("add 5\n", "5\n")
	cl[1].say("add 2\n", "7\n")
	g2, h2 := newRoom()
	next, r, err := p.upgrade(h2, WithGroups(g2))
	if err != nil || r.Moved != len(cl) || r.Stayed != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	for i, c := range cl {
		c.read("joined lobby\n")
		c.say("add 1\n", fmt.Sprint(8+i, "\n"))
	}
	c := next.dial()
	c.say("join lobby\n", "joined lobby\n")
	c.say("add 1\n", fmt.Sprint(8+len(cl), "\n"))
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
}

// A group that refuses to leave stays as a whole, and a client of the new process cannot
// split it.
func TestUpgraderGroupStays(t *testing.T) {
	g1, g2 := newRoomGroups(), newRoomGroups()
	g1.stubborn = true
	opts := []Option{WithMoveTime(200 * time.Millisecond), WithFreezeTimeout(50 * time.Millisecond)}
	p := startUpgrader(t, newFlip(t), g1.serve, append(opts, WithGroups(g1))...)
	a, b := p.dial(), p.dial()
	a.say("join lobby\n", "joined lobby\n")
	b.say("join lobby\n", "joined lobby\n")
	next, r, err := p.upgrade(g2.serve, append(opts, WithGroups(g2))...)
	if err != nil || r.Moved != 0 || r.Stayed != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	c := next.dial()
	c.say("join lobby\n", "refused\n")
	c.say("join attic\n", "joined attic\n")
	a.write("quit\n")
	b.write("quit\n")
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	c.say("join lobby\n", "joined lobby\n")
}
