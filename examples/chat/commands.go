package main

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// obey does what the member typed. An error ends this run of the handler.
func (m *member) obey(ctx context.Context, c command) error {
	switch c.name {
	case "":
		if c.arg != "" {
			m.talk(c.arg)
		}
	case "nick":
		m.rename(c.arg)
	case "join":
		return m.change(ctx, strings.TrimPrefix(c.arg, "#"))
	case "leave":
		if m.room == nil {
			m.tell("* you are in no room")
			return nil
		}
		m.tell("* you left " + m.wants)
		return m.nowhere(ctx)
	case "who":
		m.who()
	case "msg":
		to, text, _ := strings.Cut(c.arg, " ")
		m.whisper(to, strings.TrimSpace(text))
	case "version":
		m.tell(fmt.Sprintf("* chat with state version %d, process %d", m.chat.schemas.version, os.Getpid()))
	case "help":
		m.help()
	case "quit":
		m.tell("* bye")
		return errQuit
	case "away":
		if m.chat.schemas.version >= 2 {
			m.setAway(c.arg)
			return nil
		}
		fallthrough
	default:
		m.tell(fmt.Sprintf("* /%s is unknown; /help lists what there is", c.name))
	}
	return nil
}

func (m *member) help() {
	lines := []string{
		"* /nick NAME        call yourself NAME",
		"* /join ROOM        go to a room; what you type is said there",
		"* /leave            leave the room",
		"* /who              who is in the room",
		"* /msg NAME TEXT    tell one member of the room",
		"* /version          which program serves you",
		"* /quit             leave and disconnect",
	}
	if m.chat.schemas.version >= 2 {
		lines = append(lines, "* /away TEXT        say why you do not answer; /away alone: you are back")
	}
	m.tellAll(lines...)
}

// locked calls f with the member's room locked; without a room it says so.
func (m *member) locked(f func(*room)) {
	if m.room == nil {
		m.tell("* you are in no room; /join ROOM first")
		return
	}
	m.room.mu.Lock()
	defer m.room.mu.Unlock()
	f(m.room)
}

func (m *member) talk(text string) {
	m.locked(func(r *room) { r.say(m, fmt.Sprintf("<%s> %s", m.nick, text), true) })
}

func (m *member) whisper(to, text string) {
	if to == "" || text == "" {
		m.tell("* /msg NAME TEXT")
		return
	}
	m.locked(func(r *room) {
		other := r.find(to)
		if other == nil {
			m.tell(fmt.Sprintf("* nobody here is called %s", to))
			return
		}
		other.tell(fmt.Sprintf("[%s] %s", m.nick, text))
		if other.away != "" {
			m.tell(fmt.Sprintf("* %s is away: %s", other.nick, other.away))
		}
	})
}

func (m *member) rename(nick string) {
	if !validName(nick) {
		m.tell("* a name has 1 to 24 letters, digits, - or _")
		return
	}
	if m.room == nil {
		m.nick = nick
		m.tell("* you are " + nick)
		return
	}
	m.locked(func(r *room) {
		if other := r.find(nick); other != nil && other != m {
			m.tell(fmt.Sprintf("* somebody in %s is called %s", r.name, nick))
			return
		}
		old := m.nick
		m.nick = nick
		m.tell("* you are " + nick)
		r.say(m, fmt.Sprintf("* %s is %s now", old, nick), false)
	})
}

func (m *member) change(ctx context.Context, name string) error {
	switch {
	case !validName(name):
		m.tell("* a room has a name of 1 to 24 letters, digits, - or _")
		return nil
	case m.room != nil && m.wants == name:
		m.tell("* you are in " + name)
		return nil
	}
	// First out of the old room, so that a member is never in two: when joining
	// takes a move, the rest happens in another process.
	m.chat.rooms.leave(m)
	m.wants, m.joined = name, false
	return m.join(ctx)
}

func (m *member) who() {
	m.locked(func(r *room) {
		lines := []string{fmt.Sprintf("* in %s:", r.name)}
		for _, other := range r.sorted() {
			line := "* - " + other.nick
			if other.away != "" {
				line += " (away: " + other.away + ")"
			}
			lines = append(lines, line)
		}
		m.tellAll(lines...)
	})
}

func (m *member) setAway(why string) {
	set := func(*room) { m.away = why }
	if m.room != nil {
		m.locked(set)
	} else {
		set(nil)
	}
	if why == "" {
		m.tell("* you are back")
	} else {
		m.tell("* you are away: " + why)
	}
}
