package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
)

// writeLimit is how long a member may hold up the others by not reading.
const writeLimit = 5 * time.Second

// conn is what the chat needs of a *handoff.Conn; tests have another.
type conn interface {
	io.ReadWriter
	ID() uint64
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	Unread([]byte)
	State() []byte
	SetState([]byte)
	Interrupted() bool
	Group() string
	JoinGroup(ctx context.Context, name string) error
	LeaveGroup(ctx context.Context) error
}

var (
	errQuit = errors.New("the member said /quit")
	errSlow = errors.New("the member does not read what it is sent")
)

// chat is the program: its rooms, and how it saves.
type chat struct {
	schemas *schemas
	rooms   *rooms
}

func newChat(version string) (*chat, error) {
	s, err := newSchemas(version)
	if err != nil {
		return nil, err
	}
	return &chat{schemas: s, rooms: newRooms(s.room)}, nil
}

// A member is one run of the handler for one session. Its goroutine owns it; nick
// and away are read by others in its room, so they change with the room locked.
type member struct {
	chat   *chat
	conn   conn
	nick   string
	away   string
	wants  string // the room the member is in, or is about to join
	joined bool   // the room was told
	room   *room  // nil while in none
	typist typist

	out  sync.Mutex // one line at a time
	slow atomic.Bool
}

// serve is the handler.
func (c *chat) serve(ctx context.Context, conn conn) error {
	m := &member{chat: c, conn: conn}
	err := m.start(ctx)
	if err == nil {
		err = m.listen(ctx)
	}
	if errors.Is(err, handoff.ErrMoving) {
		// m stays in its room: the others' last words still reach its
		// connection, and travel with it.
		if saveErr := m.save(); saveErr != nil {
			return errors.Join(err, saveErr)
		}
		return err
	}
	c.rooms.leave(m)
	switch {
	case errors.Is(err, errQuit):
		return nil
	case errors.Is(err, handoff.ErrStopping):
		m.tell("* the chat closes down")
	}
	return err
}

// start takes up where the last owner stopped, if there was one.
func (m *member) start(ctx context.Context) error {
	old := m.conn.State()
	m.nick = fmt.Sprintf("guest%d", m.conn.ID())
	switch {
	case old != nil:
		if err := m.restore(old); err != nil {
			return err
		}
	case m.conn.Interrupted():
		// The room is known to the supervisor, the rest died with the owner.
		m.wants, m.joined = m.conn.Group(), m.conn.Group() != ""
		m.tell(fmt.Sprintf("* the chat crashed; you are still connected, but are called %s now: see /nick", m.nick))
	default:
		m.tell(fmt.Sprintf("* welcome, %s: /join ROOM to talk, /help for more", m.nick))
	}
	if m.wants == "" {
		return m.nowhere(ctx) // a move may have cut that short
	}
	return m.join(ctx)
}

func (m *member) restore(b []byte) error {
	s, err := m.chat.schemas.member.Decode(b)
	if err != nil {
		return fmt.Errorf("member %d: %w", m.conn.ID(), err)
	}
	m.nick, m.wants, m.joined, m.away = s.Nick, s.Room, s.Joined, s.Away
	m.typist.half = s.Half
	return nil
}

func (m *member) save() error {
	b, err := m.chat.schemas.member.Encode(saved{
		Nick: m.nick, Room: m.wants, Joined: m.joined, Half: m.typist.half, Away: m.away,
	})
	if err != nil {
		return fmt.Errorf("member %d: %w", m.conn.ID(), err)
	}
	m.conn.SetState(b)
	return nil
}

// join brings the member into the room it wants to be in. It returns ErrMoving
// when the room lives in another process: the handler starts again there and
// comes here once more.
func (m *member) join(ctx context.Context) error {
	err := m.conn.JoinGroup(ctx, m.wants)
	if errors.Is(err, handoff.ErrMoving) || ctx.Err() != nil {
		return err
	}
	if err != nil {
		m.tell(fmt.Sprintf("* you cannot join %s: %v", m.wants, err))
		return m.nowhere(ctx)
	}
	if err := m.chat.rooms.enter(m, m.wants, !m.joined); err != nil {
		m.tell("* " + err.Error())
		return m.nowhere(ctx)
	}
	if !m.joined {
		m.joined = true
		m.tell("* you are in " + m.wants)
	}
	return nil
}

// nowhere takes the member out of its room and out of whatever group it is in.
func (m *member) nowhere(ctx context.Context) error {
	m.chat.rooms.leave(m)
	m.wants, m.joined = "", false
	if m.conn.Group() == "" {
		return nil
	}
	err := m.conn.LeaveGroup(ctx)
	if errors.Is(err, handoff.ErrMoving) || ctx.Err() != nil {
		return err
	}
	// Without a supervisor the group stays as it is, which harms nobody: who is
	// in a room is for the room to say.
	return nil
}

// listen obeys lines until the session ends or moves.
func (m *member) listen(ctx context.Context) error {
	buf := make([]byte, 1024)
	for {
		n, err := m.conn.Read(buf)
		for p := buf[:n]; len(p) > 0; {
			line, rest, done, tooLong := m.typist.next(p)
			p = rest
			switch {
			case !done:
			case tooLong:
				m.tell(fmt.Sprintf("* that line has more than %d bytes and was not sent", maxLine))
			default:
				if err := m.obey(ctx, parse(line)); err != nil {
					if len(rest) > 0 {
						m.conn.Unread(rest)
					}
					return err
				}
			}
		}
		if m.slow.Load() {
			return errSlow
		}
		if err != nil {
			return err
		}
	}
}

// tell writes one line to the member, from any goroutine. A member that does
// not take it in time gets no more and is made to leave; any other error its
// own Read sees too.
func (m *member) tell(line string) {
	m.out.Lock()
	defer m.out.Unlock()
	if m.slow.Load() {
		return
	}
	m.conn.SetWriteDeadline(time.Now().Add(writeLimit))
	_, err := io.WriteString(m.conn, line+"\n")
	m.conn.SetWriteDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		m.slow.Store(true)
		m.conn.SetReadDeadline(time.Unix(1, 0)) // wakes its own goroutine
	}
}

func (m *member) tellAll(lines ...string) { m.tell(strings.Join(lines, "\n")) }
