package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/ktlsvisor/ktlsvisor/state"
)

// maxHistory is how many lines a room keeps for those who come later.
const maxHistory = 10

// rooms are the rooms that live in this process. It is the handoff.Groups of the
// program: a room is a group, so all its members are here.
type rooms struct {
	schema *state.Schema[savedRoom]

	mu sync.Mutex // never held together with a room's
	m  map[string]*room
}

// A room hands lines to its members, to all in the same order: it is locked
// while it does. A member that does not take its lines holds the room up for
// writeLimit, once, and is shown out.
type room struct {
	name string

	mu      sync.Mutex
	gone    bool // no longer in rooms
	members map[uint64]*member
	history []string
}

func newRooms(schema *state.Schema[savedRoom]) *rooms {
	return &rooms{schema: schema, m: make(map[string]*room)}
}

func newRoom(name string) *room { return &room{name: name, members: make(map[uint64]*member)} }

// lock returns the room of that name, locked; if there is none it makes one.
func (rs *rooms) lock(name string) *room {
	for {
		rs.mu.Lock()
		r := rs.m[name]
		if r == nil {
			r = newRoom(name)
			rs.m[name] = r
		}
		rs.mu.Unlock()
		r.mu.Lock()
		if !r.gone {
			return r
		}
		r.mu.Unlock()
		rs.forget(r)
	}
}

func (rs *rooms) forget(r *room) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.m[r.name] == r {
		delete(rs.m, r.name)
	}
}

// enter makes m a member. A member that was here before the handler was started
// again is replaced without a word; announce is for one who is new.
func (rs *rooms) enter(m *member, name string, announce bool) error {
	r := rs.lock(name)
	defer r.mu.Unlock()
	if announce {
		if r.has(m.nick) {
			return fmt.Errorf("somebody in %s is called %s; choose another name with /nick NAME and come again", name, m.nick)
		}
		for _, line := range r.history {
			m.tell("| " + line)
		}
		r.say(m, fmt.Sprintf("* %s joined %s", m.nick, name), false)
	}
	r.members[m.conn.ID()] = m
	m.room = r
	return nil
}

// leave ends m's membership, unless a newer run of its handler has taken over.
func (rs *rooms) leave(m *member) {
	r := m.room
	if r == nil {
		return
	}
	m.room = nil
	r.mu.Lock()
	if r.members[m.conn.ID()] != m {
		r.mu.Unlock()
		return
	}
	delete(r.members, m.conn.ID())
	r.say(m, fmt.Sprintf("* %s left %s", m.nick, r.name), false)
	r.gone = r.gone || len(r.members) == 0
	gone := r.gone
	r.mu.Unlock()
	if gone {
		rs.forget(r)
	}
}

// The rest is called with r locked.

// say hands a line to all members but from. Lines that are remembered are shown
// to those who come later.
func (r *room) say(from *member, line string, remember bool) {
	for _, m := range r.members {
		if m != from {
			m.tell(line)
		}
	}
	if remember {
		r.history = append(r.history, line)
		if n := len(r.history) - maxHistory; n > 0 {
			r.history = slices.Delete(r.history, 0, n)
		}
	}
}

func (r *room) has(nick string) bool { return r.find(nick) != nil }

func (r *room) find(nick string) *member {
	for _, m := range r.members {
		if strings.EqualFold(m.nick, nick) {
			return m
		}
	}
	return nil
}

func (r *room) sorted() []*member {
	return slices.SortedFunc(maps.Values(r.members), func(a, b *member) int { return cmp.Compare(a.nick, b.nick) })
}

// FreezeGroup gives away what a room has besides its members, who travel
// themselves. Their handlers have returned: nobody talks.
func (rs *rooms) FreezeGroup(name string) ([]byte, error) {
	r := rs.lock(name)
	blob, err := rs.schema.Encode(savedRoom{History: r.history})
	if err == nil {
		r.gone = true
	}
	r.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("room %s: %w", name, err)
	}
	rs.forget(r)
	return blob, nil
}

// AdoptGroup takes a room in. The members enter by themselves, when their
// handlers start. There is no blob when the room's owner died.
func (rs *rooms) AdoptGroup(name string, blob []byte) error {
	r := newRoom(name)
	if len(blob) > 0 {
		s, err := rs.schema.Decode(blob)
		if err != nil {
			return fmt.Errorf("room %s: %w", name, err)
		}
		r.history = s.History
	}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.m[name] = r
	return nil
}
